"""docs/fidelity.md says what is there: its tests, recipes and counts."""

import re

import test_recipes
import test_resnet
from conftest import ROOT

TEXT = (ROOT / "docs" / "fidelity.md").read_text()


def rows(title):
  """The cells of the table under a heading, without the heading's row."""
  part = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
  lines = re.findall(r"^\|(.*)\|$", part, re.MULTILINE)
  cells = [[cell.strip() for cell in line.split("|")] for line in lines]
  return [row for row in cells if row[0] != "---"]


def test_named_tests_exist():
  named = set(re.findall(r"`(test_\w+)`", TEXT))
  defined = set()
  for file in (ROOT / "tests").glob("test_*.py"):
    defined |= set(re.findall(r"^def (test_\w+)", file.read_text(), re.M))
  assert len(named) > 60
  assert not named - defined


def test_parameter_counts_are_those_that_are_tested():
  shown = {}
  for network, trainable, millions, _ in rows("Encoder")[-13:]:
    depth, width, *sk = network.split(", ")
    key = int(depth), int(width.removesuffix("x")), sk == ["SK"]
    shown[key] = int(trainable.replace(",", "")), float(millions[:-1])
  assert shown == test_resnet.PARAMETER_COUNTS


def test_recipes_are_those_that_are_tested():
  tested = {
    f"{row['stage']} `{row['recipe']}`": row for row in test_recipes.ROWS
  }
  shown = 0
  for _, recipe, batch, epochs, steps, optimizer, decay, _ in rows("Recipes")[
    1:
  ]:
    row = tested.get(recipe.split(" (")[0])
    if row:
      shown += 1
      assert [batch, epochs, steps, decay] == [
        row[name] for name in ("batch", "epochs", "steps", "decay")
      ]
      assert optimizer.split()[1] == row["peak"]
  assert shown == len([name for name in tested if "big" not in name])
