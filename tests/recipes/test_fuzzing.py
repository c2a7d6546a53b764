"""Senseless arguments end in instances or in one sentence; never otherwise."""

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_genmod.recipes.arguments import parse_arguments
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.training.config import TrainingConfig

ARGUMENTS = (DataArguments, ModelArguments, TrainingConfig)
NAMES = [name for cls in ARGUMENTS for name in cls.__dataclass_fields__]
VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e400", "nan", "null", "true", "[]", "32x32", "bf16", "--", "-", "--help", "None"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
quickly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parse(argv):
    """Returns instances, or raises what an example turns into one sentence, or ends as argparse does."""
    try:
        parsed = parse_arguments(*ARGUMENTS, argv=argv)
        assert [type(instance) for instance in parsed] == list(ARGUMENTS)
    except (ValueError, OSError) as error:
        assert str(error).strip()
        return str(error)
    except SystemExit as exit:
        assert exit.code == 2 or (exit.code == 0 and {"--help", "-h"} & set(argv)), argv
    return None


class TestArguments:
    @quickly
    @given(st.lists(st.tuples(st.sampled_from(NAMES), st.lists(VALUES, max_size=3)), max_size=4))
    def test_of_known_names(self, flags):
        parse([part for name, values in flags for part in (f"--{name}", *values)])

    @quickly
    @given(st.lists(st.text(max_size=12), max_size=6))
    def test_of_any_text(self, argv):
        parse(argv)

    @quickly
    @given(
        st.dictionaries(
            st.one_of(st.sampled_from(NAMES), st.text(max_size=6)),
            st.recursive(
                st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
                lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner)),
                max_leaves=4,
            ),
            max_size=4,
        )
    )
    def test_of_a_file_of_settings(self, tmp_path, values):
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        parse(["--config", str(tmp_path / "settings.yaml")])

    @quickly
    @given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
    def test_of_a_file_of_anything(self, tmp_path, content):
        (tmp_path / "settings.yaml").write_bytes(content)
        error = parse(["--config", str(tmp_path / "settings.yaml")])
        if error is not None and "max_train" not in error:
            assert str(tmp_path) in error or "--" in error
