"""Files of labels, for images that lie in no class folders."""

import csv
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from dar_jax.errors import InputError

log = logging.getLogger("dar_jax.data")

SPLITS = ("train", "val", "test")
MAX_LABELS = 1 << 28  # bytes of a file of labels
MAX_TITLE = 4096  # characters of its first line that are searched for a separator of columns


def read_labels(path: Path) -> Iterator[tuple[int, str, str]]:
    """The lines of a file of labels: the line's number, the name of an image and that of its class.

    A comma, semicolon or tab outside of quotes in its first line separates the columns of all lines, as in CSV files: the
    image, its class, and others, which are ignored. Without one, the last word of a line is the class, and the text before it
    the image. Empty lines are ignored. In Kaggle's files (ImageId,PredictionString) the class is the first word of the second
    column.

    Raises InputError if the file cannot be read or a line has no class.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_LABELS:
            raise InputError(f"data.labels {path} cannot be read: it is no file, or has more than {MAX_LABELS:,} bytes")
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            separator = re.match(r'\s*(?:"(?:[^"]|"")*"|[^",;\t]*)\s*([,;\t])', first.strip()[:MAX_TITLE])
            file.seek(0)
            if separator:
                rows = csv.reader(file, delimiter=separator[1], skipinitialspace=True, strict=True)
                numbered = ((rows.line_num, row) for row in rows)
            else:
                numbered = ((number, line.rsplit(maxsplit=1)) for number, line in enumerate(file, 1))
            kaggle = False
            for number, row in numbered:
                image, name, *_ = [*(field.strip() for field in row), "", ""]
                if not image and not name:
                    continue
                if not image or not name:
                    raise InputError(f"data.labels {path}, line {number}: an image and its class should be there")
                yield number, image, name.split()[0] if kaggle else name
                kaggle = kaggle or (image, name) == ("ImageId", "PredictionString")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.labels {path} cannot be read: {error}") from error


def by_class(files: list[str], labels: Path, class_names: list[str]) -> dict[str, list[str]]:
    """Groups the image files of one folder by class, as the file `labels` has it.

    A line names an image with or without its ending, perhaps after the folders that it lies in. Lines of other images are
    reported and ignored; the first line may be one of titles.
    """
    by_name: dict[str, list[str]] = {}
    for file in files:
        by_name.setdefault(Path(file).stem, []).append(file)
    by_name |= {os.path.basename(file): [file] for file in files}
    above = Path(os.path.abspath(files[0])).parts[:-1] if files else ()
    label_of: dict[str, tuple[str, int]] = {}
    unknown: list[str] = []
    for place, (number, image, name) in enumerate(read_labels(labels)):
        *folders, last = [part for part in image.replace("\\", "/").split("/") if part not in ("", ".")] or [""]
        images = by_name.get(last, []) if tuple(folders) == above[len(above) - len(folders) :] else []
        if not images and place > 0:
            unknown.append(f"line {number}: {image}")
        for file in images:
            if class_names and name not in class_names:
                raise InputError(f"data.labels {labels}, line {number}: {image} has the class {name}, which training has not")
            before, line = label_of.setdefault(file, (name, number))
            if before != name:
                raise InputError(
                    f"data.labels {labels}, line {number}: {image} has the class {name}, but {before} in line {line}"
                )
    if missing := [file for file in files if file not in label_of]:
        raise InputError(
            f"data.labels {labels} names no class for {len(missing)} of {len(files)} images, such as {missing[0]}"
            + (f"; no image goes by {unknown[0]}" if unknown else "")
        )
    if unknown:
        log.warning("data.labels %s has %d lines of images that are not there, such as %s", labels, len(unknown), unknown[0])
    classes: dict[str, list[str]] = {name: [] for name in class_names or sorted({name for name, _ in label_of.values()})}
    for file in files:
        classes[label_of[file][0]].append(file)
    return classes
