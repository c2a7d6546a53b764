"""Folders of images drawn at random, with what a person would say is in them."""

import csv
import dataclasses
import io
import itertools
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path

from made_images import rows
from PIL import Image

ENDINGS = ("png", "bmp", "gif", "ppm", "tif", "webp", "jpg", "PNG", "Jpeg", "JPG", "tiff")
ORDINARY = ("ant", "bee", "zebra", "New York", "cat.2", "n01440764", "__init", "a,b", "Ärger", "猫", "bullet train")
ODD = ("None", "NA", "null", "nan", "true", "1e3", "False", "01x")
SPLITS = {
    "train": ("train", "Train", "training"),
    "validation": ("val", "valid", "dev", "validation"),
    "test": ("test", "TEST", "eval"),
}
CAPTIONS = ("a cat", "NA", "null", 'he said "no", twice', "1e3", "über 猫", "x" * 200, "a; b", "true", "-1")
BESIDE = ("{0}.json", "{0}.xmp", "{0}~", "{0}.bak", "{1}.json", "{1}.xml", "{1}.xmp", "{0}_original", "._{0}")
PLAIN = ("Thumbs.db", ".DS_Store", "desktop.ini", "README.md", "LICENSE", ".gitattributes", "__MACOSX/a.png")
PLAIN += ("@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg", ".cache/x.png", ".git/objects/3.png", "__pycache__/x.pyc")
OTHERS = ("0.pdf", "notes.docx", "film.mp4", "labels.csv", "notes.txt", "photos.rar", "9.psdx", ".hidden.png")


@dataclasses.dataclass
class Layout:
    """A folder, and what is to be read in it."""

    images: dict[tuple[str, ...], int]  # its grey level, by its path
    texts: dict[tuple[str, ...], bytes] = dataclasses.field(default_factory=dict)
    links: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    folders: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    archives: dict[tuple[str, ...], dict[tuple[str, ...], int]] = dataclasses.field(default_factory=dict)
    tables: dict[tuple[str, ...], int] = dataclasses.field(default_factory=dict)  # parquet files of one row
    expected: dict[int, tuple] = dataclasses.field(default_factory=dict)  # (split, label, caption) of a grey level
    named: set[str] = dataclasses.field(default_factory=set)  # what warnings name
    refused: str | None = None  # what the error names
    story: list[str] = dataclasses.field(default_factory=list)  # how it was drawn


def level_of(number):
    """The grey level of an image: JPEG changes it by less than 2."""
    return 4 * number


def write_pool(folder: Path, count: int = 60) -> Path:
    """Small images of each grey level and each kind, which layouts link to."""
    folder.mkdir()
    for number, ending in itertools.product(range(count), sorted({ending.lower() for ending in ENDINGS})):
        options = {"lossless": True} if ending == "webp" else {"quality": 100} if "jp" in ending else {}
        Image.new("L", (2, 2), level_of(number)).save(folder / f"{number}.{ending}", **options)
    return folder


def draw(rng: random.Random) -> Layout:
    """A layout: splits, classes and captions, one of the ways to store them, and what lies beside."""
    layout = Layout({})
    splits = rng.sample(sorted(SPLITS), rng.choice((2, 3))) if rng.random() < 0.4 else ["train"]
    called = {split: rng.choice(SPLITS[split]) for split in splits}
    if len(splits) > 1 and rng.random() < 0.2:
        form = rng.choice(("{}_images", "my-{}", "{}2017"))
        called = {split: form.format(split) for split in splits}
    names = [None]
    if rng.random() < 0.7:
        kind = rng.choice(("ordinary", "odd", "numbers"))
        numbers = [str(number) for number in range(rng.choice((2, 11)))]
        names = (
            numbers if kind == "numbers" else rng.sample(ORDINARY if kind == "ordinary" else ODD, rng.choice((2, 3)))
        )
        if len(splits) == 1 and "bullet train" in names:  # it contains the name of a split
            layout.named.add("bullet train")
        elif "bullet train" in names and any(name.lower() not in sum(SPLITS.values(), ()) for name in called.values()):
            names = ["ant", "bee"]
    shape = rng.choice(("split/class", "split/class", "class/split", "data/split/class", "split/class/images"))
    if None in names:
        shape = shape.replace("split/class/images", "split/class")
    layout.story += [str(called), str(names), shape]
    number = 0
    for split, name in itertools.product(splits, names):
        for _ in range(rng.choice((1, 2)) if len(names) < 9 else 1):
            parts = {"split": called[split] if len(splits) > 1 else None, "class": name}
            folders = tuple(part for key in shape.split("/") if (part := parts.get(key, key)))
            stem = rng.choice(("{}", "IMG {}", "a.b.{}", "x-{}")).format(number)
            layout.images[(*folders, f"{stem}.{rng.choice(ENDINGS)}")] = number
            layout.expected[number] = (split, name, None)
            number += 1
    if None not in names and rng.random() < 0.15:
        _label_by_a_table(layout, rng)
    else:
        _caption(layout, rng)
    if rng.random() < 0.25:
        _pack(layout, rng)
    elif rng.random() < 0.3:
        _link(layout, rng, number)
    _lay_beside(layout, rng, number)
    return layout


def _label_by_a_table(layout, rng):
    """Labels in a table instead of class folders."""
    layout.story.append("labels in a table")
    layout.named.discard("bullet train")
    rows, images = [], {}
    for path, number in layout.images.items():
        label = layout.expected[number][1]
        path = (*(folder for folder in path[:-1] if folder != label), path[-1])
        images[path] = number
        rows.append(("/".join(path), label))
    layout.images = images
    ending = rng.choice(("jsonl", "csv"))
    layout.texts[(f"metadata.{ending}",)] = _table(rows, ending, rng, "label")


def _caption(layout, rng):
    """Captions in one of the ways to store them, which may be incomplete."""
    way = rng.choice((None, None, "txt", "jsonl", "csv", "jsonl in folders"))
    layout.story.append(str(way))
    if way is None:
        return
    texts = {path: rng.choice(CAPTIONS) for path in layout.images}
    missing = rng.choice(sorted(layout.images)) if rng.random() < 0.2 and len(layout.images) > 2 else None
    rows = {}
    for path, text in texts.items():
        if path == missing:
            continue
        split, name, _ = layout.expected[layout.images[path]]
        layout.expected[layout.images[path]] = (split, name, text)
        if way == "txt":
            stem = rng.choice((path[-1].rpartition(".")[0], path[-1]))
            mark = rng.choice((b"", b"\xef\xbb\xbf"))
            layout.texts[(*path[:-1], f"{stem}.txt")] = mark + text.encode() + rng.choice((b"", b"\n", b"\r\n"))
        else:
            folder = path[:-1] if way == "jsonl in folders" else ()
            rows.setdefault(folder, []).append(("/".join(path[len(folder) :]), text))
    ending = way.split()[0]
    for folder, lines in rows.items():
        layout.texts[(*folder, f"metadata.{ending}")] = _table(lines, ending, rng)
    if missing is None:
        return
    layout.story.append(f"no caption for {missing}")
    number = layout.images[missing]
    split = layout.expected[number][0]
    others = [key for key, found in layout.expected.items() if found[0] == split and key != number]
    if way != "txt" and any(missing[: len(folder)] == folder for folder in rows):
        del layout.expected[number]  # a metadata file is complete for its folder
        layout.named.add(missing[-1])
    elif any(layout.expected[key][2] is not None for key in others):
        layout.named.add(missing[-1])  # captions of a part of a split are of no use
        for key in others:
            layout.expected[key] = (*layout.expected[key][:2], None)


def _table(lines, ending, rng, column="text"):
    if ending == "jsonl":
        rows = [json.dumps({"file_name": name, column: text}, ensure_ascii=rng.random() < 0.5) for name, text in lines]
        return rng.choice(("\n", "\r\n", "\n\n")).join(rows).encode()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=rng.choice(("\n", "\r\n")), quoting=rng.choice((0, 1)))
    writer.writerows([("file_name", column), *lines])
    return rng.choice((b"", b"\xef\xbb\xbf")) + buffer.getvalue().encode()


def _pack(layout, rng):
    """All of it in archives instead: in one, or in one for each folder at the top."""
    ending = rng.choice(("zip", "tar", "tar.gz", "tgz", "ZIP", "tar.bz2"))
    layout.story.append(f"packed as {ending}")
    tops = sorted({path[0] for path in (*layout.images, *layout.texts)})
    if any(len(path) == 1 for path in (*layout.images, *layout.texts)) or rng.random() < 0.5:
        layout.archives[(f"all of it.{ending}",)] = layout.images | layout.texts
    else:
        for top in tops:
            inside = {path: what for path, what in (layout.images | layout.texts).items() if path[0] == top}
            if rng.random() < 0.5:
                inside = {path[1:]: what for path, what in inside.items()}
            layout.archives[(f"{top}.{ending}",)] = inside
    layout.images, layout.texts = {}, {}
    if rng.random() < 0.2:  # once more
        layout.archives = {(f"download.{rng.choice(('zip', 'tar'))}",): layout.archives}


def _link(layout, rng, number):
    """Links to files and folders elsewhere, to nowhere, and to a folder above."""
    kind = rng.choice(("folder", "file", "nowhere", "image nowhere", "circle"))
    layout.story.append(f"a link: {kind}")
    path = rng.choice(sorted(layout.images))
    if kind == "folder" and len(path) > 1:
        layout.links[path[:1]] = "elsewhere"
    elif kind == "file":
        layout.links[path] = "elsewhere"
    elif kind == "nowhere":
        layout.links[(*path[:-1], "lost")] = layout.refused = "gone away"
    elif kind == "image nowhere":
        layout.links[(*path[:-1], "lost.png")] = layout.refused = "gone away"
        if any(file[-1].startswith("metadata") for file in layout.texts):
            del layout.links[(*path[:-1], "lost.png")]
            layout.refused = None
    elif kind == "circle":
        layout.links[(*path[:-1], "around")] = "."
        layout.named.add("around")


def _lay_beside(layout, rng, number):
    """Files that are no images, images that are not in use, and faults."""
    paths = sorted(layout.images)
    if paths and rng.random() < 0.5:
        path = rng.choice(paths)
        for name in rng.sample(BESIDE, 2):
            layout.texts.setdefault((*path[:-1], name.format(path[-1], path[-1].rpartition(".")[0])), b"{}")
    for name in rng.sample(PLAIN, 2) if rng.random() < 0.5 else ():
        folder = rng.choice(paths)[:-1] if paths else ()
        layout.texts[(*folder, *name.split("/"))] = b"what a system writes"
    if rng.random() < 0.3 and not layout.refused:
        folder = rng.choice(paths)[:-1] if paths else ()
        for name in rng.sample(OTHERS, 2):
            layout.texts[(*folder, name)] = b"%PDF or whatever"
            layout.named.add(name)
    if not paths or layout.refused or layout.links:
        return
    classes = {found[1] for found in layout.expected.values()}
    fault = rng.choice(
        (None,) * 8
        + ("empty", "archive", "foreign", "broken", "locked", "beside", "bytes", "row", "no ending", "table")
    )
    layout.story.append(f"fault: {fault}")
    if fault == "empty":
        layout.folders.append(("nothing here",))
        layout.named.add("nothing here")
    elif fault == "archive":  # beside what was unpacked from it
        ending = rng.choice(("zip", "tar.gz"))
        layout.archives[(f"original.{ending}",)] = dict(layout.images)
        layout.named.add(f"original.{ending}")
    elif fault == "foreign":
        layout.archives[("original.zip",)] = {("other", "foreign.png"): number}
        layout.refused = "original.zip"
    elif fault == "broken":
        layout.texts[("original.zip",)] = b"PK\x03\x04 and no more"
        layout.refused = "original.zip"
    elif fault == "locked":  # the images in it are not those beside it, or they would not be needed
        layout.texts[("original.zip",)] = _locked({("other", "foreign.png"): b"secret"})
        layout.refused = "original.zip"
    elif fault == "table":
        name = rng.choice(("pics.parquet", "train.parquet", "extra/x.parquet"))
        layout.tables[(*name.split("/"),)] = number
    elif fault in ("bytes", "row"):
        tables = [path for path in layout.texts if path[-1].startswith("metadata")]
        for path in tables[:1]:
            layout.refused = path[-1] if fault == "bytes" else "lost.png"
            row = b'{"file_name": "lost.png", "text": "x"}' if path[-1].endswith("jsonl") else b"lost.png,x"
            layout.texts[path] = layout.texts[path].rstrip() + b"\n" + (b"\xff\xfe" if fault == "bytes" else row)
    elif fault == "no ending" and not any(path[-1].startswith(("metadata", "a.b")) for path in layout.texts):
        path = rng.choice(paths)
        if not any(other[:-1] == path[:-1] and other[-1].startswith(path[-1][:-4]) for other in layout.texts):
            name = rng.choice(("download", "0.jpg_large", "x.dat"))
            layout.images[(*path[:-1], name)] = layout.images.pop(path)
            layout.named = {name if named == path[-1] else named for named in layout.named}
    elif fault == "beside" and classes != {None} and not any("caption for" in line for line in layout.story):
        if any(path[-1].startswith("metadata") for path in layout.texts):
            return
        # An image beside the class folders has no label, so that labels are of no use.
        layout.images[("beside.png",)] = number
        if len({split for split, *_ in layout.expected.values()}) > 1:
            layout.refused = "beside.png"
            return
        has_captions = any(caption is not None for *_, caption in layout.expected.values())
        layout.expected = {
            key: (split, None, None if has_captions else caption)
            for key, (split, _, caption) in layout.expected.items()
        }
        layout.expected[number] = ("train", None, None)
        layout.named.add("beside.png")


def write(layout: Layout, root: Path, pool: Path, rng: random.Random) -> None:
    """Writes a layout, its files in any order."""
    root.mkdir()
    elsewhere = root.with_name(f"{root.name} elsewhere")
    moved = [path for path, target in layout.links.items() if target == "elsewhere"]

    def place(path):
        at = elsewhere if any(path[: len(link)] == link for link in moved) else root
        at.joinpath(*path[:-1]).mkdir(parents=True, exist_ok=True)
        return at.joinpath(*path)

    files = [*layout.images.items(), *layout.texts.items()]
    rng.shuffle(files)
    for path, what in files:
        if isinstance(what, bytes):
            place(path).write_bytes(what)
        else:
            os.link(_pooled(path, what, pool), place(path))
    for path, number in layout.tables.items():
        image = {"bytes": (pool / f"{number}.png").read_bytes(), "path": None}
        place(path)
        rows([image]).to_parquet(root.joinpath(*path))
    for path, target in layout.links.items():
        goal = elsewhere.joinpath(*path) if target == "elsewhere" else root if target == "." else root / target
        root.joinpath(*path[:-1]).mkdir(parents=True, exist_ok=True)
        root.joinpath(*path).symlink_to(goal)
    for path in layout.folders:
        root.joinpath(*path).mkdir()
    for path, inside in layout.archives.items():
        _write_archive(root.joinpath(*path), inside, pool)


def _pooled(path, number, pool):
    ending = path[-1].rpartition(".")[2].lower()
    return pool / f"{number}.{ending if ending in map(str.lower, ENDINGS) else 'png'}"


def _write_archive(file: Path, inside, pool):
    file.write_bytes(_packed(file.name, inside, pool))


def _packed(name, inside, pool):
    """The content of an archive of images, texts and archives."""
    contents = {}
    for path, what in inside.items():
        if isinstance(what, dict):
            what = _packed(path[-1], what, pool)
        contents["/".join(path)] = what if isinstance(what, bytes) else _pooled(path, what, pool).read_bytes()
    buffer = io.BytesIO()
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, content in contents.items():
                archive.writestr(member, content)
        return buffer.getvalue()
    modes = {".tar": "w", ".bz2": "w:bz2"}
    with tarfile.open(fileobj=buffer, mode=modes.get(os.path.splitext(name)[1], "w:gz")) as archive:
        for member, content in contents.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _locked(inside):
    """A .zip whose directory says that a password is needed."""
    content = bytearray(_packed("x.zip", inside, None))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)
