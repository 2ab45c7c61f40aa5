"""Annotations in COCO's format before a run: faults are repaired, left out and told, or refused.

mmdet drops annotations without a word, and pycocotools takes an annotation with the id 0 for none.
"""

import gc
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dense.classes import classes_of
from dense.configs import dicts
from runtime.errors import UserError, reason_of, some
from runtime.files import written_whole

Annotation = dict[str, Any]


def use_checked(config: Any, parts: tuple[str, ...], writes: bool) -> list[str]:
    """Check the annotation files of data sets in a config; return what has to be told.

    A file that needs repairs is written anew into work_dir, by the process that `writes`, and takes
    the place of the original. Evaluators with an annotation file get that of their data set. Raises
    UserError for what cannot be repaired.
    """
    lines: list[str] = []
    if config.default_scope != "mmdet":
        return lines
    checked: dict[tuple[Path, bool, bool, tuple[str, ...]], Path] = {}
    for part in parts:
        data = (config.get(f"{part}_dataloader") or {}).get("dataset")
        files: dict[str, str] = {}
        for dataset in _coco_sets(data):
            path, classes, masks = _path(dataset), classes_of(dataset, "mmdet"), _has_masks(dataset)
            key = path, part == "train", masks, tuple(classes)
            if key not in checked:
                whole = read(path)
                content, told = clean(whole, path, classes, masks, part)
                lines += [f"{path}: {line}" for line in told]
                least = (dataset.get("filter_cfg") or {}).get("min_size", 0)
                sizes = [min(image["width"], image["height"]) for image in whole["images"]]
                if part == "train" and (small := sum(size < least for size in sizes)):
                    lines.append(f"{path}: {small} images of less than filter_cfg.min_size {least} "
                                 "pixels are left out")  # fmt: skip
                checked[key] = path
                if content is not None:
                    number = f"-{len(files) + 1}" if files else ""  # of several in a part
                    folder = Path(config.work_dir).resolve()
                    checked[key] = folder / f"{part}-annotations{number}.json"
                    lines.append(f"{path}: the repaired annotations are in {checked[key]}")
                    if writes:
                        checked[key].parent.mkdir(parents=True, exist_ok=True)
                        with written_whole(checked[key]) as temporary:
                            temporary.write_text(json.dumps(content))
            dataset.ann_file = files[str(path.resolve())] = str(checked[key].resolve())
        for evaluator in dicts(config.get(f"{part}_evaluator")):
            if evaluator.get("ann_file") and files:
                given = str(Path(evaluator["ann_file"]).resolve())
                only = next(iter(files.values())) if len(files) == 1 else given
                evaluator["ann_file"] = files.get(given, only)
    return lines


def _coco_sets(data: Any) -> Iterator[Any]:
    """Yield the data sets in COCO's format, of mmdet, in a data set and its wrappers.

    Types that read the files in a way of their own (panoptic, LVIS, Objects365) are left out, and
    files that are not on a disk.
    """
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    for found in dicts(data):
        kind: Any = found.get("type")
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(kind, type) and issubclass(kind, CocoDataset)):
            continue
        names = ("load_data_list", "parse_data_info")
        is_own = any(getattr(kind, name) is not getattr(CocoDataset, name) for name in names)
        if not is_own and found.get("ann_file") and not found.get("backend_args"):
            yield found


def _path(dataset: Any) -> Path:
    return Path(dataset.get("data_root") or "") / dataset.ann_file


def _has_masks(dataset: Any) -> bool:
    return any(step.get("with_mask") for step in dicts(dataset.get("pipeline")))


def read(path: Path) -> dict[str, Any]:
    """Read an annotation file; UserError if it is none."""
    collects = gc.isenabled()
    gc.disable()  # it would walk through millions of new objects again and again
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not in COCO's format: {reason_of(error)}") from None
    finally:
        if collects:
            gc.enable()
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in COCO's format: it holds a {type(content).__name__}")
    content.setdefault("annotations", [])
    for name in lists:
        if not isinstance(content.get(name), list):
            raise UserError(f"{path} is not in COCO's format: it has no list of {name}")
        if not all(isinstance(item, dict) for item in content[name]):
            raise UserError(f"{path}: not all of its {name} are objects with keys")
    return content


def clean(
    content: dict[str, Any], path: Path, classes: list[str], masks: bool, part: str = "train"
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the repaired content, or None if it is as it should be, and what has to be told.

    `masks` says whether the detector needs segmentations. In the `part` 'train', boxes that show
    nothing are left out; in others they stay, so that accuracies remain comparable. Raises
    UserError for what cannot be repaired, and if nothing is left.
    """
    categories, ordered = _categories(content, path, classes)
    images = _by_id(content, path, "images", ("file_name", "width", "height"))
    annotations: list[Annotation] = content["annotations"]
    notes: dict[str, list[Any]] = defaultdict(list)
    kept: list[Annotation] = []
    changed, usable, crowds, known = ordered is not None, 0, 0, set(classes)
    for number, annotation in enumerate(annotations):
        where = f"{path}: annotation {annotation.get('id', f'number {number + 1}')}"
        image = images[_known(annotation, "image_id", images, where)]
        category = _known(annotation, "category_id", categories, where)
        where += f" of image {annotation['image_id']}"
        repaired, reasons, is_kept = _repaired(annotation, image, masks, part == "train", where)
        for reason in reasons:
            notes[reason].append(annotation.get("id", number + 1))
        changed |= repaired is not annotation or not is_kept
        if is_kept:
            kept.append(repaired)
            crowds += bool(repaired["iscrowd"])
            unlearnt = repaired["iscrowd"] or repaired.get("ignore")
            usable += categories[category] in known and not unlearnt
            if categories[category] not in known:
                notes["have categories outside the config's classes and are ignored"].append(
                    annotation.get("id", number + 1)
                )
    lines = [_line(len(annotations), reason, ids) for reason, ids in notes.items()]
    if crowds:
        lines.append(f"{crowds} of {len(annotations)} annotations are crowds, which are not learnt")
    if not usable and (annotations or part != "test"):
        why = f"of {len(annotations)} annotations none is left: {'; '.join(lines)}"
        raise UserError(f"{path}: {why if annotations else 'it has no annotations'}")
    if not annotations:
        lines.append("no annotations: there is nothing to compare with")
    if ordered:
        lines.append("the categories are reordered to the config's classes, which labels follow")
    names = Counter(image["file_name"] for image in images.values())
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        lines.append(f"{len(twice)} files are listed under several ids: {some(twice, 3)}")
    ids = [annotation.get("id") for annotation in kept]
    if not all(type(i) is int and i > 0 for i in ids) or len(set(ids)) < len(ids):
        lines.append(
            "the annotations get new ids from 1 on: some have the id 0, which the evaluation takes "
            "for none, the same id as another, or no whole number"
        )
        kept = [annotation | {"id": number} for number, annotation in enumerate(kept, 1)]
        changed = True
    result = content | {"annotations": kept, "categories": ordered or content["categories"]}
    return (result if changed else None), lines


def _line(count: int, reason: str, ids: list[Any]) -> str:
    return f"{len(ids)} of {count} annotations {reason}: {some(map(str, ids), 3)}"


def _categories(
    content: dict[str, Any], path: Path, classes: list[str]
) -> tuple[dict[Any, str], list[Any] | None]:
    """Return the names of the categories by id, and the categories in another order.

    That is None if they are in the order of the classes. UserError if they do not fit these.
    """
    found = _by_id(content, path, "categories", ("name",))
    names = [category["name"] for category in found.values()]
    for listed, where in ((classes, "the config's classes"), (names, str(path))):
        repeated = [name for name, count in Counter(listed).items() if count > 1]
        if repeated:
            raise UserError(f"{where}: category {repeated[0]} is listed more than once")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(
            f"{path} has no category {str(missing[:3])[1:-1]}, which the config has among its "
            f"classes; its categories: {str(names[:10])[1:-1]}"
        )
    known, ordered = set(classes), None
    if [name for name in names if name in known] != classes:
        by_name = {category["name"]: category for category in content["categories"]}
        rest = [category for name, category in by_name.items() if name not in known]
        ordered = [by_name[name] for name in classes] + rest
    return {number: category["name"] for number, category in found.items()}, ordered


def _by_id(
    content: dict[str, Any], path: Path, what: str, needed: tuple[str, ...]
) -> dict[Any, dict[str, Any]]:
    """Return images or categories by id; UserError if one lacks a key, or two have the same id."""
    found: dict[Any, dict[str, Any]] = {}
    for number, item in enumerate(content[what]):
        name = f"{path}: {what[:-1] if what == 'images' else 'category'}"
        for key in ("id", *needed):
            if item.get(key) is None:
                which = item.get("file_name") or item.get("name") or f"number {number + 1}"
                raise UserError(f"{name} {which} has no {key}")
        for key in ("width", "height"):
            if key in needed and not (_is_number(item[key]) and item[key] > 0):
                raise UserError(f"{name} {item['file_name']}: its {key} is {item[key]!r}")
        for key in {"file_name", "name"} & {*needed}:
            if not isinstance(item[key], str):
                raise UserError(f"{name} number {number + 1}: its {key} is {item[key]!r}")
        if not isinstance(item["id"], int | str):
            raise UserError(f"{name} number {number + 1}: its id is {item['id']!r}")
        if item["id"] in found:
            raise UserError(f"{name}: two have the id {item['id']!r}")
        found[item["id"]] = item
    return found


def _known(annotation: Annotation, key: str, known: dict[Any, Any], where: str) -> Any:
    """Return an id to which an annotation refers; UserError if there is no such thing."""
    value = annotation.get(key)
    if value is None:
        raise UserError(f"{where} has no {key}")
    try:
        if value in known:
            return value
    except TypeError:  # a list
        raise UserError(f"{where}: its {key} is {value!r}") from None
    other = next(iter(known), None)
    if isinstance(value, str) != isinstance(other, str):
        what, that = ("text", "numbers") if isinstance(value, str) else ("a number", "text")
        raise UserError(f"{where}: its {key} {value!r} is {what}, but the ids are {that}")
    raise UserError(f"{where} has the unknown {key} {value}")


def _repaired(
    annotation: Annotation, image: dict[str, Any], masks: bool, trains: bool, where: str
) -> tuple[Annotation, list[str], bool]:
    """Return an annotation with all keys, what has to be told of it, and whether it is kept."""
    reasons: list[str] = []
    changes: dict[str, Any] = {}
    segmentation: Any = annotation.get("segmentation")
    polygons: list[Any] = []
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if _is_polygon(p)]
        if len(polygons) < len(segmentation):
            reasons.append("have polygons that are not the numbers of three or more points")
            changes["segmentation"] = polygons
    is_mask = isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys()
    if is_mask and segmentation["size"] != [image["height"], image["width"]]:
        raise UserError(
            f"{where}: the size of its segmentation is {segmentation['size']}, that of the image "
            f"(height, width) {[image['height'], image['width']]}"
        )
    if masks and not polygons and not is_mask:
        return annotation, [*reasons, "have no usable segmentation and are left out"], False
    box = annotation.get("bbox")
    if box is None and (polygons or is_mask):
        box = changes["bbox"] = _box_of(polygons) if polygons else _box_of_mask(segmentation)
        reasons.append("have no bbox, which is computed from their segmentation")
    if box is None:
        raise UserError(f"{where} has no bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise UserError(f"{where}: its bbox {box!r} is not four numbers")
    x, y, width, height = box
    if not all(map(math.isfinite, box)):
        return annotation, [*reasons, "have a bbox that is not finite and are left out"], False
    right, bottom = x + width, y + height
    nothing = ""
    if width < 1 or height < 1:
        nothing = "have a box of less than a pixel"
    elif x >= image["width"] or y >= image["height"] or right <= 0 or bottom <= 0:
        nothing = "have a box outside their image"
    if nothing and trains:
        return annotation, [*reasons, f"{nothing} and are left out"], False
    if nothing:
        reasons.append(nothing)
    if right > image["width"] + 1 or bottom > image["height"] + 1 or min(x, y) < -1:
        reasons.append("reach beyond their image; boxes are (x, y, width, height) in pixels")
    area: Any = annotation.get("area")
    if not (_is_number(area) and math.isfinite(area) and area > 0):
        computed = sum(map(_area_of, polygons)) or abs(width * height)
        if computed != area:
            changes["area"] = computed
            reasons.append("have no area above 0, which is computed")
    crowd = annotation.get("iscrowd")
    if crowd not in (0, 1):
        changes["iscrowd"] = int(crowd == "1")
        if crowd is not None:
            reasons.append(f"have the iscrowd {crowd!r}, which becomes {changes['iscrowd']}")
    if annotation.get("segmentation") is not None and not polygons and not is_mask:
        changes["segmentation"] = []
    return (annotation | changes if changes else annotation), reasons, True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    try:
        return math.isfinite(sum(value))
    except TypeError:  # text, null, a list of points
        return False


def _box_of_mask(mask: dict[str, Any]) -> list[float]:
    from pycocotools import mask as run_lengths

    if isinstance(mask["counts"], list):
        mask = run_lengths.frPyObjects(mask, *mask["size"])
    return run_lengths.toBbox(mask).tolist()


def _box_of(polygons: list[list[float]]) -> list[float]:
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _area_of(polygon: list[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    turned = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in turned)) / 2
