"""Each sampler in turn."""

import pytest
from small_pipelines import SAMPLERS


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    """A name, and a function from the config of a scheduler to the sampler."""
    cls, options = SAMPLERS[request.param]
    return request.param, lambda config: cls.from_config(config, **options)
