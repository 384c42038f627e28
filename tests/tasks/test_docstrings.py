import pytest

from hf_sam import SAMConfig
from hf_sam.sharpness import SharpnessConfig
from hf_sam.tasks import report, sharpness
from hf_sam.tasks.command_line.arguments import _Parser
from hf_sam.tasks.command_line.docstrings import described


class Documented:
    """
    Something.

    Args:
        first (`int`, *optional*, defaults to 1):
            What it is,
            over two lines. See [`~package.Other`].
        second, third (`float`): Two `alike`.

    Raises:
        ValueError: Never.
    """


def test_entries_of_one_line_of_several_and_of_several_names():
    assert described(Documented) == {
        "first": "What it is, over two lines. See package.Other.",
        "second": "Two alike.",
        "third": "Two alike.",
    }
    assert described(type("Bare", (), {"__doc__": "Nothing."})) == {}


def test_every_field_of_what_a_user_configures_is_described():
    assert set(described(SAMConfig)) | {"method"} == set(SAMConfig.fields())
    assert all(described(SAMConfig).values())
    assert "measures" in described(SharpnessConfig)


def test_help_says_what_the_docstring_says():
    from hf_sam.tasks.command_line.arguments import SAMArguments

    text = " ".join(_Parser([SAMArguments, SharpnessConfig]).format_help().split())
    assert "Size of the perturbation: the p-norm of eps over all perturbed parameters together." in text
    assert 'Standard deviation of the noise of "average"' in text


@pytest.mark.parametrize("recipe", [sharpness, report])
def test_help_needs_no_checkpoint(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe.main(["--help"])
    assert ended.value.code == 0
    assert "--checkpoints" in capsys.readouterr().out
