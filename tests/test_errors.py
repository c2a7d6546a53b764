import io
import sys

import pytest

from hf_genmod.errors import a_or_an, one_line_errors


def test_a_name_has_its_article():
    assert [a_or_an("VAE"), a_or_an("UnconditionalPipeline")] == ["a VAE", "an UnconditionalPipeline"]


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
    with pytest.raises(SystemExit), one_line_errors(goes_on=True):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "stopped; what is done is kept, and the same command goes on from there\n"


def test_an_error_of_the_system_names_the_file_and_not_its_number(capsys, tmp_path):
    with pytest.raises(SystemExit), one_line_errors():
        open(tmp_path / "nope.png", "rb")
    assert capsys.readouterr().err == f"error: {tmp_path / 'nope.png'}: No such file or directory\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_console_prints_characters_that_it_lacks_as_escapes(monkeypatch, encoding):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
    with one_line_errors():
        print("γ 猫")
    sys.stdout.flush()
    assert printed.getvalue() == b"\\u03b3 \\u732b\n"
