import pytest

from hf_genmod.errors import one_line_errors


def test_a_mistake_ends_a_script_with_one_line(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise ValueError("batch_size: 0 is not positive")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: batch_size: 0 is not positive\n"


def test_an_interrupted_set_up_ends_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"
