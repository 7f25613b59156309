"""The README shows what is in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_first_steps_are_the_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "first_steps.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in readme
    assert len([line for line in example.splitlines() if line]) <= 12
