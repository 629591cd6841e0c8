"""Tiny datasets in the layouts in which the real ones are downloaded, and layouts that expect their size."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.evaluate.datasets import LAYOUTS, LabelledTiles, open_dataset
from histoscale.evaluate.datasets.layout import Published

CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def pixels(number: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    """A tile that no other number gives."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def picture(path: Path, number: int, height: int = 8, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number, height, width)).save(path)


def opened(folder: Path, layout: str = "auto", *, name: str | None = None, **published: Any) -> LabelledTiles:
    """Open a place, expecting of one layout, by default the named one, another size than the published one."""
    base = name or layout.partition(":")[0]
    sizes = dict.fromkeys(LAYOUTS[base].published, Published(**published))
    return open_dataset(str(folder), layout, {**LAYOUTS, base: replace(LAYOUTS[base], published=sizes)})


def image_of(tiles: LabelledTiles, index: int) -> NDArray[np.uint8]:
    tile = tiles.source.read(index)[1]
    assert tile is not None
    return tile


def write_pcam(folder: Path, counts: Mapping[str, int], *, gzipped: bool = False, meta: bool = True) -> None:
    """Labels alternate 0 1 0 1; tile i of a split is `pixels(1000 * split + i)`; two tiles per slide."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack([pixels(1000 * number + index, 96, 96) for index in range(count)])
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
        if meta:
            rows = [f"{i},{i},{i},True,True,camelyon_{split}_{i // 2:03d}" for i in range(count)]
            table = "\n".join([",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *rows, ""])
            (folder / f"{stem}_meta.csv").write_text(table)
        if gzipped:
            for path in list(folder.glob(f"{stem}_*")):
                Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()


def write_crc(folder: Path, train: str = "NCT-CRC-HE-100K") -> None:
    """Two tiles of each class to train, one to test."""
    for number, label in enumerate(CRC_CLASSES):
        for index in range(2):
            picture(folder / train / label / f"{label}-TCGA-{index}.tif", 10 * number + index)
        picture(folder / "CRC-VAL-HE-7K" / label / f"{label}-TCGA-9.tif", 10 * number + 9)


def write_mhist(folder: Path) -> None:
    """Of six tiles, those of even number are HP; the last two test."""
    rows = ["Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"]
    for number, name in enumerate("fedcba"):
        picture(folder / "images" / f"MHIST_aa{name}.png", number)
        rows.append(f"MHIST_aa{name}.png,{('HP', 'SSA')[number % 2]},3,{'test' if number > 3 else 'train'}")
    (folder / "annotations.csv").write_text("\n".join([*rows, ""]))


def write_camelyon17(folder: Path) -> None:
    """Ten tiles, two of each hospital; of each two, one has tumour; hospital 0 holds one tile back."""
    rows = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for number in range(10):
        center, tumor = number // 2, number % 2
        patient = f"{4 + center:03d}"
        name = f"patch_patient_{patient}_node_1_x_{32 * number}_y_64.png"
        picture(folder / "patches" / f"patient_{patient}_node_1" / name, number)
        rows.append(f"{number},{patient},1,{32 * number},64,{tumor},{center},{center},{int(number == 1)}")
    (folder / "metadata.csv").write_text("\n".join([*rows, ""]))


def write_tils(folder: Path) -> None:
    """Six tiles of two studies, and the folder of links to all of them."""
    rows = ["partition,study,barcode,label,path,md5"]
    for number in range(6):
        part, study = ("train", "val", "test")[number // 2], ("acc", "brca")[number % 2]
        label = ("til-negative", "til-positive")[number % 2]
        barcode = f"TCGA-{('OR', 'A1')[number % 2]}-A5J{number // 2}"
        for place in (study, "pancancer"):
            key = f"images-tcga-tils/{place}/{part}/{label}/{barcode}_{number}.png"
            picture(folder / key, number)
            rows.append(f"{part},{place},{barcode},{label},{key},{number}")
    (folder / "images-tcga-tils-metadata.csv").write_text("\n".join([*rows, ""]))


MIDOG_CELLS = (
    # id, image, category, x and y of the box of 50 px; images are 600 x 400 px
    (1, 2, 1, 150, 150),  # a mitotic figure
    (2, 2, 2, 300, 150),  # nearer than 224 px to it
    (3, 2, 2, 400, 160),  # far enough
    (4, 2, 2, 60, 300),  # too near to the border
    (5, 7, 2, 87, 87),  # just far enough from the border
    (6, 7, 1, 463, 263),  # likewise, at the other corner
)


def write_midog(folder: Path, *, table: bool = True) -> None:
    images = [{"file_name": f"{name:03d}.tiff", "id": name, "width": 600, "height": 400} for name in (2, 7, 9)]
    cells = [
        {"bbox": [x, y, x + 50, y + 50], "category_id": category, "image_id": image, "id": number}
        for number, image, category, x, y in MIDOG_CELLS
    ]
    (folder / "databases").mkdir(parents=True)
    (folder / "databases" / "MIDOG++.json").write_text(json.dumps({"images": images, "annotations": cells}))
    for name in (2, 7):  # the third image has no cells
        picture(folder / "images" / f"{name:03d}.tiff", name, 400, 600)
    if table:
        rows = ["Slide;Dataset;Tumor;Scanner;Origin;Species", "2;train;t;Hamammatsu XR;o;Human", "7;test;t;GT;o;Human"]
        (folder / "datasets_xvalidation.csv").write_text("\n".join(rows))


def write_dlbcl(folder: Path) -> None:
    """Three patients with two patches each, the third with no label; and a patch of another stain."""
    rows = ["patient_id,HANS,CD10 IHC,MUM1 IHC,Follow-up Status", "13901,1.0,1,0,0", "13902,0.0,0,1,1", "13903,,,,0"]
    (folder / "clinical_data_cleaned.csv").parent.mkdir(parents=True, exist_ok=True)
    (folder / "clinical_data_cleaned.csv").write_text("\n".join(rows))
    for patient in (13901, 13902, 13903):
        for number in range(2):
            picture(folder / "Patches" / "HE" / str(patient) / f"{number}.png", patient + number)
    picture(folder / "Patches" / "MYC" / "13901" / "0.png", 1)


def write_bach(folder: Path) -> None:
    for number, label in enumerate(("Benign", "InSitu", "Invasive", "Normal")):
        for index in range(2):
            picture(
                folder / "ICIAR2018_BACH_Challenge" / "Photos" / label / f"{label[0]}{index}.tif", 10 * number + index
            )


def write_breakhis(folder: Path) -> None:
    """One tile per type and magnification; the two adenoma types are blocks of the same case."""
    types = {
        "A": ("benign", "adenosis"),
        "F": ("benign", "fibroadenoma"),
        "PT": ("benign", "phyllodes_tumor"),
        "TA": ("benign", "tubular_adenoma"),
        "DC": ("malignant", "ductal_carcinoma"),
        "LC": ("malignant", "lobular_carcinoma"),
        "MC": ("malignant", "mucinous_carcinoma"),
        "PC": ("malignant", "papillary_carcinoma"),
    }
    for number, (short, (side, long)) in enumerate(types.items()):
        case = {"A": "22549AB", "TA": "22549CD"}.get(short, f"{3000 + number}")
        for zoom in (40, 100, 200, 400):
            name = f"SOB_{side[0].upper()}_{short}-14-{case}-{zoom}-001.png"
            place = folder / "BreaKHis_v1" / "histology_slides" / "breast" / side / "SOB" / long
            picture(place / f"SOB_{side[0].upper()}_{short}_14-{case}" / f"{zoom}X" / name, 1000 * number + zoom)


def write_gleason(folder: Path) -> None:
    for number, array in enumerate(("ZT111", "ZT199", "ZT204", "ZT76", "ZT80")):
        top = "test_patches_750/patho_1" if array == "ZT80" else "train_validation_patches_750"
        core = f"{array}_4_A_1_{number}"
        for grade in (0, 3):
            picture(folder / top / core / f"{core}_patch_{grade + 1}_class_{grade}.jpg", 10 * number + grade)
    other = "ZT80_4_A_1_4"  # the second pathologist's labels of the same core
    picture(folder / "test_patches_750" / "patho_2" / other / f"{other}_patch_1_class_1.jpg", 1)
