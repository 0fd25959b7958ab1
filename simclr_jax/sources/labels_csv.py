"""labels.csv: the few labels that there are, one file a line."""

import codecs
import csv
import os
import unicodedata

from simclr_jax.config import UserError


def read_labels(path: str, files: list[str]) -> tuple[list[str], list[str]]:
  """Reads a csv whose first line names the columns file, label and maybe split.

  Other columns are ignored.

  Args:
    path: of the csv, UTF-8; a file's name may have any bytes.
    files: paths of all images, relative to the folder.

  Returns:
    (labels, splits), one of each a file: "" where the csv has none. All
    splits are "" where it has no such column; where it has one, a labelled or
    listed file without a split is in "train".

  Raises:
    UserError: names the line and what is wrong with it.
  """
  try:
    with open(path, "rb") as file:
      _check_text(path, file.read(1 << 12))
    # What is not UTF-8 becomes what os.listdir makes of such a file's name.
    with open(
      path, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
      rows = list(_rows(path, csv.reader(file)))
  except OSError as error:
    raise UserError(
      f"{shown(path)}: cannot be read ({error.strerror})."
    ) from None
  if not rows:
    raise UserError(f"{shown(path)} is empty; its first line is file,label.")
  header = [_clean(name).lower() for name in rows[0][1]]
  if "file" not in header or "label" not in header:
    raise UserError(
      f"{shown(path)}: its first line must be file,label or file,label,split; "
      f'it is "{shown(",".join(rows[0][1]))}".'
    )
  for name in ("file", "label", "split"):
    if header.count(name) > 1:
      raise UserError(
        f'{shown(path)}: its first line has "{name}" more than once; keep one '
        "of these columns."
      )
  position = {file: i for i, file in enumerate(files)}
  file_of = {composed(file): file for file in files}
  labels, splits = [""] * len(files), [""] * len(files)
  line_of: dict[str, int] = {}
  for line, row in rows[1:]:
    where = f"{shown(path)} line {line}"
    if len(row) != len(header):
      raise UserError(
        f"{where}: {len(row)} fields where the first line has {len(header)}; "
        'put a name with a comma in it in "quotes".'
      )
    fields = dict(zip(header, (field.strip() for field in row), strict=True))
    given = os.path.normpath(fields["file"])
    file = given if given in position else file_of.get(composed(given), given)
    if file not in position:
      raise UserError(f"{where}: {_unknown(fields['file'], files)}")
    value = _clean(fields["label"]), _clean(fields.get("split", ""))
    i = position[file]
    for name, text in zip(("label", "split"), value, strict=True):
      if not _is_utf8(text):  # It would be a class of its own.
        raise UserError(
          f'{where}: the {name} "{shown(text)}" is not UTF-8; save the csv as '
          "UTF-8."
        )
    if file in line_of and value != (labels[i], splits[i]):
      raise UserError(
        f"{where}: {shown(file)} is in line {line_of[file]} too, as "
        f'"{shown(labels[i])}"; keep one of them.'
      )
    line_of.setdefault(file, line)
    labels[i], splits[i] = value
    if not value[0] and value[1] not in ("", "train"):
      raise UserError(f'{where}: an image of split "{value[1]}" needs a label.')
  if "split" in header:
    splits = [split or "train" for split in splits]
  return labels, splits


def composed(name: str) -> str:
  """The same name with each accent in its letter; a Mac writes them apart.

  >>> len("e\u0301"), len(composed("e\u0301"))
  (2, 1)
  """
  return unicodedata.normalize("NFC", name)


def _clean(text):
  """Without what nobody sees, so that no class is two."""
  return composed(text.strip().strip("\u200b\u2060\ufeff").strip())


def _rows(path, reader):
  """(line, fields) of all lines that are not empty."""
  try:
    for row in reader:
      if any(field.strip() for field in row):
        yield reader.line_num, row
  except csv.Error as error:
    raise UserError(f"{shown(path)} line {reader.line_num}: {error}.") from None


def _check_text(path, start):
  """UserError where the first bytes are of another kind of file."""
  if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise UserError(f"{shown(path)} is UTF-16; save it as UTF-8.")
  if b"\0" in start:
    raise UserError(
      f"{shown(path)} is not text in UTF-8; save it as a csv in UTF-8."
    )


def _is_utf8(text):
  try:
    text.encode()
  except UnicodeEncodeError:  # A byte that surrogateescape has kept.
    return False
  return True


def _unknown(file, files):
  """What to say about a file that is not there."""
  name = os.path.basename(file)
  same = [f for f in files if os.path.basename(f) == name]
  text = f"there is no image {shown(file)} in the folder"
  if len(same) == 1:
    return f'{text}; did you mean "{shown(same[0])}"?'
  if same:
    return (
      f"{text}, but {len(same)} of that name, such as {shown(same[0])} and "
      f"{shown(same[1])}; write the path."
    )
  if not _is_utf8(file):
    return f"{text}, and the name is not UTF-8; save the csv as UTF-8."
  return f"{text}; paths are relative to it."


def shown(name: str) -> str:
  """A file's name for a message: in one line, whatever bytes it has."""
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in name
  )
