"Every reader on a generated tree in its data set's real layout."

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from zsad_nb.data.folder import read_csv, read_folder
from zsad_nb.data.images import check
from zsad_nb.data.index import COLUMNS, root_of
from zsad_nb.data.layouts import pair, read_mvtec
from zsad_nb.data.listing import LayoutError
from zsad_nb.data.masks import load_mask
from zsad_nb.data.medical import read_headct
from zsad_nb.data.readers import READERS, detect, read, reader_name
from zsad_nb.data.sets import read_ksdd2

I, M, E = "image", "mask", "empty mask"  # what a file holds
SHARED = Path(os.environ.get("ZSAD_SHARED", Path(__file__).parents[2] / ".." / "shared"))


def build(root: Path, tree: dict[str, object]) -> Path:
    "Write a tree of small files, and into every folder the litter that real data sets come with."
    for number, (name, what) in enumerate(tree.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(what, str):
            Image.fromarray(what).save(path)
        elif what in (I, M, E):
            pixels = np.full((12, 16), 10 + number % 200 if what == I else 0, "uint8")
            if what == M:
                pixels[2:6, 3:9] = 255
            Image.fromarray(pixels).save(path)
        else:
            path.write_text(what)
        for litter in ("Thumbs.db", ".DS_Store", "._" + path.name, "readme.txt"):
            if not (path.parent / litter).exists():
                (path.parent / litter).write_bytes(b"litter")
        (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
    return root


def seen(index):
    return {row.image: (row.category, row.split, row.defect, row.mask) for row in index.itertuples()}


def mvtec(*classes, good="good", bad="bent", image="png", mask="_mask.png"):
    "Three defective images a class; the mask of the first is missing, so pairing by sorted order would shift."
    tree, want = {}, {}
    for c in classes:
        for split, n in (("train", "000"), ("test", "000"), ("test", "001")):
            tree[f"{c}/{split}/{good}/{n}.{image}"], want[f"{c}/{split}/{good}/{n}.{image}"] = I, (c, split, "good", "")
        for n in ("000", "001", "002"):
            tree[f"{c}/test/{bad}/{n}.{image.upper() if n == '002' else image}"] = I
            found = f"{c}/ground_truth/{bad}/{n}{mask}" if n != "000" else ""
            if found:
                tree[found] = M
            want[f"{c}/test/{bad}/{n}.{image.upper() if n == '002' else image}"] = (c, "test", bad, found)
    return tree, want


def one(category, tree_and_want, prefix=""):
    "MVTec layout whose root is one class."
    tree, want = tree_and_want

    def cut(path):
        return path.split("/", 1)[1] if path else ""

    return {prefix + cut(k): v for k, v in tree.items()}, {
        cut(k): (category, s, d, cut(m)) for k, (_, s, d, m) in want.items()
    }


def beside(category, defect, images, masks, suffix, mask_suffix):
    "Images beside masks; the first has no mask, and a stray mask has no image."
    tree = {f"{images}/{n}{suffix}": I for n in (1, 2, 10)} | {f"{masks}/{n}{mask_suffix}": M for n in (2, 10, 99)}
    return tree, {
        f"{images}/{n}{suffix}": (category, "test", defect, f"{masks}/{n}{mask_suffix}" if n > 1 else "")
        for n in (1, 2, 10)
    }


def two(category, folders, inside="", sub=""):
    "Folders of images without masks."
    tree = {f"{inside}{name}/{sub}{n}": I for name in folders for n in ("1.jpg", "b 2.JPEG")}
    return tree, {path: (category, "test", folders[path[len(inside) :].split("/")[0]], "") for path in tree}


VISA = {
    "candle/Data/Images/Normal/0000.JPG": I,
    "candle/Data/Images/Normal/0001.JPG": I,
    "candle/Data/Images/Anomaly/000.JPG": I,
    "candle/Data/Images/Anomaly/001.JPG": I,
    "candle/Data/Images/Anomaly/002.JPG": I,
    "candle/Data/Masks/Anomaly/001.png": M,
    "candle/Data/Masks/Anomaly/002.png": M,
}
VISA_WANT = {
    "candle/Data/Images/Normal/0000.JPG": ("candle", "train", "good", ""),
    "candle/Data/Images/Normal/0001.JPG": ("candle", "test", "good", ""),
    **{
        f"candle/Data/Images/Anomaly/{n}.JPG": (
            "candle",
            "test",
            "",
            f"candle/Data/Masks/Anomaly/{n}.png" if n != "000" else "",
        )
        for n in ("000", "001", "002")
    },
}
VISA_CSV = "object,split,label,image,mask\n" + "".join(
    f"candle,{s},{'normal' if d == 'good' else 'anomaly'},{image},{m}\n" for image, (_, s, d, m) in VISA_WANT.items()
)
LABELS = np.zeros((12, 16), "uint8")
LABELS[:4], LABELS[4:6] = 3, 1
REAL = {
    "meta": {"prefix": "mint/", "normal_class": "OK"},
    "train": [dict(category="mint", anomaly_class="OK", image_path="OK/S1/a.jpg", mask_path=None)],
    "test": [
        dict(category="mint", anomaly_class="OK", image_path="OK/S1/b.jpg", mask_path=None),
        dict(category="mint", anomaly_class="PS", image_path="NG/PS/S2/c.jpg", mask_path="NG/PS/S2/c.png"),
        dict(category="mint", anomaly_class="HS", image_path="NG/HS/S2/d.jpg", mask_path="NG/HS/S2/d.png"),
    ],
}
BMAD = {
    "train/good/1.png": I,
    "test/good/img/2.png": I,
    "test/good/label/2.png": E,
    "test/Ungood/img/3.png": I,
    "test/Ungood/img/4.png": I,
    "test/Ungood/label/4.png": M,
    "valid/good/img/5.png": I,
    "valid/Ungood/img/6.png": I,
    "valid/Ungood/label/6.png": M,
}

# case -> (reader, tree, what each image must be, options, is the layout told apart without the folder's name)
CASES = {
    "mvtec": ("mvtec", *mvtec("screw", "grid"), {}, True),
    "mvtec, one class": ("mvtec_like", *one("here", mvtec("here")), dict(category="here"), True),
    "mvtec_like": ("mvtec_like", *mvtec("bolt"), {}, True),
    "mvtec_loco": (
        "mvtec_loco",
        {
            **{
                f"pushpins/{path}.png": I
                for path in (
                    "train/good/000",
                    "validation/good/000",
                    "test/good/000",
                    "test/logical_anomalies/000",
                    "test/logical_anomalies/001",
                    "test/structural_anomalies/000",
                )
            },
            **{
                f"pushpins/ground_truth/{path}.png": M
                for path in ("logical_anomalies/000/000", "logical_anomalies/000/001", "structural_anomalies/000/000")
            },
        },
        {
            "pushpins/train/good/000.png": ("pushpins", "train", "good", ""),
            "pushpins/test/good/000.png": ("pushpins", "test", "good", ""),
            "pushpins/test/logical_anomalies/000.png": (
                "pushpins",
                "test",
                "logical_anomalies",
                "pushpins/ground_truth/logical_anomalies/000",
            ),
            "pushpins/test/logical_anomalies/001.png": ("pushpins", "test", "logical_anomalies", ""),
            "pushpins/test/structural_anomalies/000.png": (
                "pushpins",
                "test",
                "structural_anomalies",
                "pushpins/ground_truth/structural_anomalies/000",
            ),
        },
        {},
        True,
    ),
    "mvtec_ad_2": (
        "mvtec_ad_2",
        {
            **{
                f"vial/{path}.png": I
                for path in (
                    "train/good/000_regular",
                    "validation/good/000_regular",
                    "test_public/good/000_overexposed",
                    "test_public/bad/000_regular",
                    "test_public/bad/001_shift_1",
                    "test_private/000_regular",
                    "test_private_mixed/000_mixed",
                    "test_private_mixed/001_mixed",
                )
            },
            "vial/test_public/ground_truth/bad/001_shift_1_mask.png": M,
        },
        {
            "vial/train/good/000_regular.png": ("vial", "train", "good", ""),
            "vial/test_public/good/000_overexposed.png": ("vial", "test", "good", ""),
            "vial/test_public/bad/000_regular.png": ("vial", "test", "bad", ""),
            "vial/test_public/bad/001_shift_1.png": (
                "vial",
                "test",
                "bad",
                "vial/test_public/ground_truth/bad/001_shift_1_mask.png",
            ),
        },
        dict(valid="skip"),
        True,
    ),
    "anomalib": (
        "anomalib",
        {
            **{f"good/{n}.png": I for n in ("0", "1", "a/2")},
            "held/9.png": I,
            "held/8.jpg": I,
            **{f"crack/{n}.png": I for n in ("0", "1")},
            "hole/deep/0.png": I,
            "mask/crack/1_mask.png": M,
            "mask/hole/deep/0.png": M,
        },
        {
            **{f"good/{n}.png": ("line", "train", "good", "") for n in ("0", "1", "a/2")},
            "held/9.png": ("line", "test", "good", ""),
            "crack/0.png": ("line", "test", "crack", ""),
            "crack/1.png": ("line", "test", "crack", "mask/crack/1_mask.png"),
            "hole/deep/0.png": ("line", "test", "deep", "mask/hole/deep/0.png"),
        },
        dict(
            normal_dir="good",
            normal_test_dir=["held"],
            abnormal_dir=["crack", "hole"],
            mask_dir=["mask/crack", "mask/hole"],
            extensions=["png"],
            category="line",
        ),
        False,
    ),
    "visa": ("visa", VISA | {"split_csv/1cls.csv": VISA_CSV}, VISA_WANT, {}, True),
    "visa, defects named": (
        "visa",
        VISA
        | {
            "split_csv/1cls.csv": VISA_CSV,
            "candle/image_anno.csv": 'image,label,mask\ncandle/Data/Images/Anomaly/001.JPG,"bent,melted",x\n',
        },
        VISA_WANT
        | {
            "candle/Data/Images/Anomaly/001.JPG": ("candle", "test", "bent,melted", "candle/Data/Masks/Anomaly/001.png")
        },
        {},
        True,
    ),
    "visa, no list": ("visa", VISA, {image: (c, "test", d, m) for image, (c, _, d, m) in VISA_WANT.items()}, {}, True),
    "visa, rebuilt": ("visa", *mvtec("candle", bad="bad", image="JPG", mask=".png"), {}, True),
    "mpdd": ("mpdd", *mvtec("tubes", "connector"), {}, True),
    "btad": ("btad", *mvtec("01", good="ok", bad="ko", image="bmp", mask=".png"), {}, True),
    "btad, wrapped": (
        "btad",
        {
            "BTech_Dataset_transformed/" + k: v
            for k, v in mvtec("03", good="ok", bad="ko", image="bmp", mask=".bmp")[0].items()
        },
        mvtec("03", good="ok", bad="ko", image="bmp", mask=".bmp")[1],
        {},
        True,
    ),
    "ksdd": (
        "ksdd",
        {
            "kos01/Part0.jpg": I,
            "kos01/Part0_label.bmp": E,
            "kos01/Part1.jpg": I,
            "kos01/Part1_label.bmp": M,
            "kos50/Part7.JPG": I,
            "kos50/Part7_label.BMP": E,
        },
        {
            "kos01/Part0.jpg": ("electrical commutators", "test", "good", ""),
            "kos01/Part1.jpg": ("electrical commutators", "test", "defect", "kos01/Part1_label.bmp"),
            "kos50/Part7.JPG": ("electrical commutators", "test", "good", ""),
        },
        {},
        True,
    ),
    "ksdd, strips": ("ksdd", *one("SDD", mvtec("x", bad="defect"), "SDD/"), dict(category="SDD"), True),
    "ksdd2": (
        "ksdd2",
        {
            f"{s}/{n}{end}.png": what
            for s, n, m in (("train", "10000", E), ("test", "20000", M), ("test", "20001", E))
            for end, what in (("", I), ("_GT", m))
        },
        {
            "train/10000.png": ("electrical commutators", "train", "good", ""),
            "test/20000.png": ("electrical commutators", "test", "defect", "test/20000_GT.png"),
            "test/20001.png": ("electrical commutators", "test", "good", ""),
        },
        {},
        True,
    ),
    "dagm": (
        "dagm",
        {
            f"{c}/{s}/{n}.PNG": I
            for c in ("Class2", "Class10")
            for s in ("Train", "Test")
            for n in ("0001", "0002", "0010")
        }
        | {f"{c}/{s}/Label/0010_label.PNG": M for c in ("Class2", "Class10") for s in ("Train", "Test")}
        | {"Class2/Test/Label/Labels.txt": "1\n0001\t0\t0001.PNG\t0\t0\n0002\t1\t0002.PNG\t0\t0002_label.PNG\n"},
        {
            f"{c}/{s}/{n}.PNG": (
                c,
                s.lower(),
                "good" if n != "0010" else "defect",
                f"{c}/{s}/Label/0010_label.PNG" if n == "0010" else "",
            )
            for c in ("Class2", "Class10")
            for s in ("Train", "Test")
            for n in ("0001", "0002", "0010")
        }
        | {"Class2/Test/0002.PNG": ("Class2", "test", "defect", "")},
        {},
        True,
    ),
    "dagm, rebuilt": ("dagm", *mvtec("Class1", bad="defect"), {}, False),
    "dtd": ("dtd", *mvtec("Woven_001", "Mesh_114"), {}, True),
    "rsdd": (
        "rsdd",
        {
            "neg/1.jpg": I,
            "neg/1.png": E,
            "pos/2.jpg": I,
            "pos/3.JPG": I,
            "pos/3.png": M,
            "pos/4.jpg": I,
            "pos/4.png": M,
        },
        {
            "neg/1.jpg": ("rail", "test", "good", ""),
            "pos/2.jpg": ("rail", "test", "defect", ""),
            "pos/3.JPG": ("rail", "test", "defect", "pos/3.png"),
            "pos/4.jpg": ("rail", "test", "defect", "pos/4.png"),
        },
        {},
        True,
    ),
    "rsdd, rebuilt": ("rsdd", *one("rail", mvtec("x")), {}, False),
    "mad": (
        "mad",
        {f"MAD-{h}/{k}": v for h in ("Sim", "Real") for k, v in mvtec("Owl", bad="Stains")[0].items()},
        {
            f"MAD-{h}/{k}": (c, s, d, f"MAD-{h}/{m}" if m else "")
            for h in ("Sim", "Real")
            for k, (c, s, d, m) in mvtec("Owl", bad="Stains")[1].items()
        },
        {},
        True,
    ),
    "real_iad": (
        "real_iad",
        {
            "realiad_jsons/mint.json": json.dumps(REAL),
            "realiad_1024/mint/OK/S1/a.jpg": I,
            "realiad_1024/mint/OK/S1/b.jpg": I,
            "realiad_1024/mint/NG/PS/S2/c.jpg": I,
            "realiad_1024/mint/NG/PS/S2/c.png": M,
            "realiad_1024/mint/NG/HS/S2/d.jpg": I,
        },
        {
            "realiad_1024/mint/OK/S1/a.jpg": ("mint", "train", "good", ""),
            "realiad_1024/mint/OK/S1/b.jpg": ("mint", "test", "good", ""),
            "realiad_1024/mint/NG/PS/S2/c.jpg": ("mint", "test", "PS", "realiad_1024/mint/NG/PS/S2/c.png"),
            "realiad_1024/mint/NG/HS/S2/d.jpg": ("mint", "test", "HS", ""),
        },
        {},
        True,
    ),
    "headct": (
        "headct",
        {
            "head_ct/000.png": I,
            "head_ct/001.png": I,
            "head_ct/010.png": I,
            "labels.csv": "id, hemorrhage\n0,1\n1,0\n10,1\n",
        },
        {
            "head_ct/000.png": ("brain", "test", "haemorrhage", ""),
            "head_ct/001.png": ("brain", "test", "good", ""),
            "head_ct/010.png": ("brain", "test", "haemorrhage", ""),
        },
        {},
        True,
    ),
    "headct, wrapped twice": (
        "headct",
        {"head_ct/head_ct/000.png": I, "labels.csv": "id, hemorrhage\n0,1\n"},
        {"head_ct/head_ct/000.png": ("brain", "test", "haemorrhage", "")},
        {},
        True,
    ),
    "headct, rebuilt": (
        "headct",
        {"test/good/1.png": I, "test/defect/2.png": I},
        {"test/good/1.png": ("brain", "test", "good", ""), "test/defect/2.png": ("brain", "test", "defect", "")},
        {},
        False,
    ),
    "brainmri": ("brainmri", *two("brain", {"no": "good", "yes": "tumor"}, "brain_tumor_dataset/"), {}, True),
    "br35h": (
        "br35h",
        two("brain", {"no": "good", "yes": "tumor"})[0] | {"pred/pred0.jpg": I},
        two("brain", {"no": "good", "yes": "tumor"})[1],
        {},
        True,
    ),
    "covid19": (
        "covid19",
        two(
            "chest",
            {"Normal": "good", "COVID": "COVID", "Viral Pneumonia": "Viral Pneumonia"},
            "COVID-19_Radiography_Dataset/",
            "images/",
        )[0]
        | {f"COVID-19_Radiography_Dataset/{k}/masks/1.jpg": M for k in ("Normal", "COVID", "Viral Pneumonia")},
        {
            k.split("/", 1)[1]: v
            for k, v in two(
                "chest",
                {"Normal": "good", "COVID": "COVID", "Viral Pneumonia": "Viral Pneumonia"},
                "COVID-19_Radiography_Dataset/",
                "images/",
            )[1].items()
        },
        {},
        True,
    ),
    "covid19, flat": ("covid19", *two("chest", {"NORMAL": "good", "COVID": "COVID"}), {}, True),
    "isic": (
        "isic",
        *beside(
            "skin",
            "lesion",
            "ISBI2016_ISIC_Part1_Test_Data",
            "ISBI2016_ISIC_Part1_Test_GroundTruth",
            ".jpg",
            "_Segmentation.png",
        ),
        {},
        True,
    ),
    "colondb": ("colondb", *beside("colon", "polyp", "images", "masks", ".png", ".png"), {}, False),
    "clinicdb": ("clinicdb", *beside("colon", "polyp", "images", "masks", ".png", ".png"), {}, False),
    "clinicdb, as distributed": (
        "clinicdb",
        *beside("colon", "polyp", "Original", "Ground Truth", ".tif", ".tif"),
        {},
        True,
    ),
    "kvasir": ("kvasir", *beside("colon", "polyp", "images", "masks", ".jpg", ".jpg"), {}, False),
    "endo": ("endo", *beside("colon", "polyp", "images", "masks", ".jpg", ".png"), {}, False),
    "tn3k": ("tn3k", *beside("thyroid", "nodule", "test-image", "test-mask", ".jpg", ".jpg"), {}, True),
    "oct17": (
        "oct17",
        {f"{s}/{k}/{k}-1-1.jpeg": I for s in ("train", "test", "val") for k in ("NORMAL", "CNV", "DME", "DRUSEN")},
        {
            f"{s}/{k}/{k}-1-1.jpeg": ("retina", s, "good" if k == "NORMAL" else k, "")
            for s in ("train", "test")
            for k in ("NORMAL", "CNV", "DME", "DRUSEN")
        },
        {},
        True,
    ),
    "oct17, BMAD": (
        "oct17",
        {"train/good/1.png": I, "test/good/2.png": I, "test/Ungood/3.png": I},
        {
            "train/good/1.png": ("retina", "train", "good", ""),
            "test/good/2.png": ("retina", "test", "good", ""),
            "test/Ungood/3.png": ("retina", "test", "defect", ""),
        },
        {},
        False,
    ),
    "brain_ad": (
        "brain_ad",
        BMAD,
        {
            "train/good/1.png": ("brain", "train", "good", ""),
            "test/good/img/2.png": ("brain", "test", "good", ""),
            "test/Ungood/img/3.png": ("brain", "test", "defect", ""),
            "test/Ungood/img/4.png": ("brain", "test", "defect", "test/Ungood/label/4.png"),
        },
        {},
        True,
    ),
    "brain_ad, with valid": (
        "brain_ad",
        {k: v for k, v in BMAD.items() if "valid" in k},
        {
            "valid/good/img/5.png": ("brain", "train", "good", ""),
            "valid/Ungood/img/6.png": ("brain", "train", "defect", "valid/Ungood/label/6.png"),
        },
        dict(valid="train"),
        False,
    ),
    "his": (
        "his",
        {"train/good/1.png": I, "test/good/2.png": I, "test/Ungood/3.png": I, "valid/Ungood/4.png": I},
        {
            "train/good/1.png": ("histopathology", "train", "good", ""),
            "test/good/2.png": ("histopathology", "test", "good", ""),
            "test/Ungood/3.png": ("histopathology", "test", "defect", ""),
        },
        {},
        False,
    ),
    "neu_seg": (
        "neu_seg",
        {
            "images/training/000001.jpg": I,
            "images/training/000002.jpg": I,
            "images/test/000001.jpg": I,
            "annotations/training/000002.png": LABELS,
            "annotations/test/000001.png": LABELS // 3,
        },
        {
            "images/training/000001.jpg": ("steel strip", "train", "", ""),
            "images/training/000002.jpg": ("steel strip", "train", "scratches", "annotations/training/000002.png"),
            "images/test/000001.jpg": ("steel strip", "test", "inclusion", "annotations/test/000001.png"),
        },
        {},
        True,
    ),
    "deeppcb": (
        "deeppcb",
        {
            "template/001.jpg": I,
            "test/001.jpg": I,
            "boxes/001.txt": "1 1 3 3 4\n5 5 6 6 2\n7 7 8 8 4\n",
            "derived_masks/001.png": M,
            "template/002.jpg": I,
            "test/002.jpg": I,
            "boxes/002.txt": "1 1 3 3 6\n",
        },
        {
            "template/001.jpg": ("pcb", "test", "good", ""),
            "template/002.jpg": ("pcb", "test", "good", ""),
            "test/001.jpg": ("pcb", "test", "spur", "derived_masks/001.png"),
            "test/002.jpg": ("pcb", "test", "pin-hole", ""),
        },
        {},
        True,
    ),
    "deeppcb, as distributed": (
        "deeppcb",
        {
            "PCBData/group00041/00041/00041000_temp.jpg": I,
            "PCBData/group00041/00041/00041000_test.jpg": I,
            "PCBData/group00041/00041_not/00041000.txt": "1,1,3,3,1\n",
            "PCBData/trainval.txt": "x",
        },
        {
            "group00041/00041/00041000_temp.jpg": ("pcb", "test", "good", ""),
            "group00041/00041/00041000_test.jpg": ("pcb", "test", "open", "box_masks/00041000_test.png"),
        },
        {},
        True,
    ),
    "crackforest": (
        "crackforest",
        beside("road", "crack", "images", "masks", ".jpg", ".png")[0] | {"images_no_gt/201.jpg": I},
        beside("road", "crack", "images", "masks", ".jpg", ".png")[1],
        {},
        True,
    ),
    "folder": (
        "folder",
        {"OK/1.jpg": I, "NG/7.jpg": I, "NG/10.JPG": I, "masks/10_mask.png": M},
        {
            "OK/1.jpg": ("lid", "test", "good", ""),
            "NG/7.jpg": ("lid", "test", "", ""),
            "NG/10.JPG": ("lid", "test", "", "masks/10_mask.png"),
        },
        dict(category="lid"),
        True,
    ),
    "folder of products": (
        "folder",
        {
            "lid/good/1.png": I,
            "lid/bad/dent/2.png": I,
            "lid/bad/scratch/2.png": I,
            "lid/ground_truth/dent/2.png": M,
            "lid/ground_truth/scratch/2_mask.png": M,
            "cap/normal/1.png": I,
        },
        {
            "lid/good/1.png": ("lid", "test", "good", ""),
            "lid/bad/dent/2.png": ("lid", "test", "dent", "lid/ground_truth/dent/2.png"),
            "lid/bad/scratch/2.png": ("lid", "test", "scratch", "lid/ground_truth/scratch/2_mask.png"),
            "cap/normal/1.png": ("cap", "test", "good", ""),
        },
        {},
        True,
    ),
    "folder with a CSV": (
        "folder",
        {
            "a/1.png": I,
            "a/2.png": I,
            "m/2.png": M,
            "list.csv": (
                "Filename,Label,Mask,Category,Defect,Split\na/1.png,good,,01,,train\na/2.png,NG,m/2.png,01,dent,\n"
            ),
        },
        {"a/1.png": ("01", "train", "good", ""), "a/2.png": ("01", "test", "dent", "m/2.png")},
        {},
        True,
    ),
}

# what each case's folder holds besides: a stray mask, and what the set's layout sets aside
LEFT_OUT = {
    "br35h": dict(apart=1),
    "covid19": dict(apart=3),
    "oct17": dict(apart=4),
    "brain_ad": dict(apart=3),
    "his": dict(apart=1),
    "mvtec_loco": dict(apart=1),
    "mvtec_ad_2": dict(apart=3),
    "anomalib": dict(elsewhere=1),
    "crackforest": dict(apart=1, masks=1),
    **{
        case: dict(masks=1)
        for case in ("isic", "colondb", "clinicdb", "clinicdb, as distributed", "kvasir", "endo", "tn3k")
    },
}


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


@pytest.mark.parametrize("case", CASES)
def test_reader(tmp_path, case):
    name, tree, want, options, _ = CASES[case]
    index = quiet(read, name, build(tmp_path / "here", tree), **options)
    assert seen(index) == want and len(index) == len(want)
    assert tuple(index.columns) == COLUMNS and (index.anomalous == (index.defect != "good")).all()
    problems = quiet(check, index)
    assert set(problems.problem) <= {
        "missing_mask",
        "duplicate",
        "left_out",
    }  # every path leads to a file of the right size and content
    assert {group["reason"]: group["count"] for group in index.attrs["left_out"]} == LEFT_OUT.get(case, {})
    assert problems.problem.eq("left_out").sum() == len(LEFT_OUT.get(case, {}))


def test_every_reader_has_a_case():
    assert {case[0] for case in CASES.values()} == set(READERS)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][4]])
def test_detect_by_layout(tmp_path, case):
    assert detect(build(tmp_path / "here", CASES[case][1])) == CASES[case][0]


@pytest.mark.parametrize(
    "folder, case",
    [
        ("CVC-ColonDB", "colondb"),
        ("CVC-ClinicDB", "clinicdb"),
        ("Kvasir-SEG", "kvasir"),
        ("endo", "endo"),
        ("OCT2017", "oct17, BMAD"),
        ("HIS", "his"),
        ("Br35H", "br35h"),
        ("MVTec_AD", "mvtec"),
        ("HeadCT", "headct, rebuilt"),
        ("RSDD", "rsdd, rebuilt"),
    ],
)
def test_detect_by_name_where_layouts_are_shared(tmp_path, folder, case):
    assert detect(build(tmp_path / folder, CASES[case][1])) == CASES[case][0]


def test_detect_does_not_toss_a_coin(tmp_path):
    with pytest.raises(LayoutError, match="laid out like colondb, clinicdb, kvasir, endo"):
        detect(build(tmp_path / "here", CASES["kvasir"][1]))
    with pytest.raises(LayoutError, match="laid out like oct17, his"):
        detect(build(tmp_path / "there", CASES["his"][1]))
    (tmp_path / "void").mkdir()
    with pytest.raises(LayoutError, match="no known layout.*is empty"):
        detect(tmp_path / "void")
    with pytest.raises(LayoutError, match="does not exist"):
        detect(tmp_path / "gone")


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_folder_says_what_was_expected_and_found(tmp_path, name):
    build(tmp_path / "here", {"holidays/beach.jpg": I, "holidays/notes.md": "sun"})
    for root, found in ((tmp_path / "here", "holidays/"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(LayoutError) as error:
            read(name, root)
        assert "expected" in str(error.value) and found in str(error.value), str(error.value)


# ---- read: names, options, counts ----


def test_names_titles_and_aliases():
    for name, reader in READERS.items():
        for spelling in (name, name.upper(), reader.title, *reader.aliases):
            assert reader_name(spelling) == name, spelling
    for wrong, near in (("mvtek", "mvtec"), ("KSDD3", "ksdd"), ("brain mri2", "brainmri"), ("deep-pcbs", "deeppcb")):
        with pytest.raises(ValueError, match="unknown data set") as error:
            reader_name(wrong)
        assert "did you mean" in str(error.value) and repr(near) in str(error.value)


def test_unknown_option_is_named(tmp_path):
    with pytest.raises(TypeError, match="no option 'splitcsv', did you mean 'split_csv'"):
        read("visa", tmp_path, splitcsv="1cls")


def test_counts_and_categories_that_differ_are_warnings(tmp_path):
    build(tmp_path / "here", CASES["mvtec"][1] | mvtec("teapot")[0])
    with pytest.warns(UserWarning) as caught:
        read("mvtec", tmp_path / "here")
    text = "\n".join(str(warning.message) for warning in caught)
    assert "3 categories, expected 15: without bottle" in text and "with unknown teapot" in text
    assert "the test half has 6 normal and 9 anomalous images, expected 467 and 1258" in text
    assert "3 anomalous images have no mask (first: grid/test/bent/000.png)" in text


def test_expected_counts_are_silent(tmp_path, monkeypatch):
    build(tmp_path / "here", {k: v for k, v in CASES["tn3k"][1].items() if "/1." not in k and "/99." not in k})
    monkeypatch.setitem(
        READERS, "tn3k", READERS["tn3k"].__class__(**{**READERS["tn3k"].__dict__, "counts": ((5, 5), (0, 2))})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read("tn3k", tmp_path / "here")) == 2
        assert read("tn3k", tmp_path / "here", category="neck").category.unique().tolist() == ["neck"]


def test_the_table_is_complete():
    counts = {
        "mvtec": (467, 1258),
        "visa": (962, 1200),
        "mpdd": (176, 282),
        "btad": (451, 290),
        "dagm": (6996, 1054),
        "dtd": (357, 947),
        "headct": (100, 100),
        "br35h": (1500, 1500),
        "isic": (0, 379),
        "colondb": (0, 380),
        "clinicdb": (0, 612),
        "kvasir": (0, 1000),
        "endo": (0, 200),
        "tn3k": (0, 614),
    }
    assert all(READERS[name].counts == (pair,) for name, pair in counts.items())
    assert {name: len(READERS[name].categories) for name in ("mvtec", "visa", "mpdd", "btad", "dagm", "dtd")} == {
        "mvtec": 15,
        "visa": 12,
        "mpdd": 6,
        "btad": 3,
        "dagm": 10,
        "dtd": 12,
    }
    assert {(286, 54), (181, 74)} == set(READERS["ksdd"].counts)
    assert [name for name, reader in READERS.items() if not reader.masks] == [
        "headct",
        "brainmri",
        "br35h",
        "covid19",
        "oct17",
        "his",
    ]


# ---- pairing ----


def test_masks_belong_by_name_not_by_position(tmp_path):
    "Each image and its mask carry the same number in their pixels."
    for n in range(12):
        code = np.full((8, 8), 10 + n, "uint8")
        build(
            tmp_path,
            {f"screw/test/bent/{n}.png": code}
            | ({f"screw/ground_truth/bent/{n}_mask.png": code} if n not in (0, 5) else {})
            | {"screw/test/good/0.png": I},
        )
    index = quiet(read_mvtec, tmp_path)
    paired = index[index["mask"] != ""]
    assert len(paired) == 10 and index[index.anomalous]["mask"].eq("").sum() == 2
    for row in paired.itertuples():
        assert np.array(Image.open(tmp_path / row.image))[0, 0] == np.array(Image.open(tmp_path / row.mask))[0, 0]


def test_ambiguous_masks_raise(tmp_path):
    def P(*names):
        return [tmp_path / name for name in names]

    with pytest.raises(LayoutError, match="1.png has 2 masks"):
        pair(P("1.png"), P("1_mask.png", "1.bmp"))
    with pytest.raises(LayoutError, match="belongs by name to 1.png and 1.jpg"):
        pair(P("1.png", "1.jpg"), P("1_mask.png"))
    with pytest.warns(UserWarning, match="2 masks in .* belong to no image"):
        assert pair(P("1.png"), P("11_mask.png", "01_mask.png")) == [None]


def test_one_folder_of_masks_for_two_defects_must_be_unambiguous(tmp_path):
    build(tmp_path, {"good/1.png": I, "bad/dent/2.png": I, "bad/scratch/2.png": I, "masks/2.png": M})
    with pytest.raises(LayoutError, match="belongs by name to 2.png and 2.png"):
        read_folder(tmp_path)


# ---- the odd ones ----


def test_ksdd2_image_without_label_file_is_left_out(tmp_path):
    build(tmp_path, CASES["ksdd2"][1] | {"test/30000.png": I})
    with pytest.warns(UserWarning, match="1 images have no label file"):
        assert len(read_ksdd2(tmp_path)) == 3


def test_visa_list_and_folder_disagree(tmp_path):
    build(
        tmp_path,
        VISA
        | {
            "split_csv/1cls.csv": VISA_CSV + "candle,test,normal,candle/Data/Images/Normal/9.JPG,\n",
            "candle/Data/Images/Normal/0007.JPG": I,
        },
    )
    with pytest.warns(UserWarning) as caught:
        assert len(read("visa", tmp_path)) == 5
    text = "\n".join(str(warning.message) for warning in caught)
    assert (
        "1 images are not in 1cls.csv (first: candle/Data/Images/Normal/0007.JPG)" in text
        and "lists 1 images that do not exist" in text
    )


def test_headct_labels_and_images_disagree(tmp_path):
    build(tmp_path, CASES["headct"][1] | {"head_ct/099.png": I})
    with pytest.warns(UserWarning, match="1 numbers are in labels.csv or in head_ct/ but not in both"):
        assert len(read_headct(tmp_path)) == 3


def test_covid_folders_can_be_chosen(tmp_path):
    index = quiet(read, "covid19", build(tmp_path, CASES["covid19"][1]), defects=("COVID",))
    assert sorted(set(index.defect)) == ["COVID", "good"]


def test_mad_halves(tmp_path):
    build(tmp_path, CASES["mad"][1])
    assert quiet(read, "mad", tmp_path).dataset.value_counts().to_dict() == {"mad_sim": 6, "mad_real": 6}
    assert quiet(read, "mad", tmp_path / "MAD-Real").dataset.unique().tolist() == ["mad_real"]
    with pytest.raises(LayoutError, match="MAD-sim"):
        quiet(read, "mad", tmp_path / "MAD-Real", subset="sim")


def test_real_iad_without_its_images_says_so(tmp_path):
    build(tmp_path, {"realiad_jsons/mint.json": json.dumps(REAL), "realiad_1024/other/1.jpg": I})
    with pytest.raises(LayoutError, match="names mint/OK/S1/b.jpg, which is neither in the root"):
        read("real_iad", tmp_path)


def test_deeppcb_masks_from_boxes(tmp_path):
    build(tmp_path / "pcb", {k: v for k, v in CASES["deeppcb"][1].items() if "derived" not in k})
    index = quiet(read, "deeppcb", tmp_path / "pcb", out=tmp_path / "masks")
    assert (
        root_of(index) == tmp_path
        and index["mask"].tolist()[2:] == ["masks/001.png", "masks/002.png"]
        and not (tmp_path / "pcb" / "box_masks").exists()
    )
    mask = load_mask(tmp_path / "masks/001.png")
    assert mask.sum() == 9 + 4 + 4 and mask[1:4, 1:4].all() and mask.shape == (12, 16)
    assert quiet(read, "deeppcb", tmp_path / "pcb", masks="none")["mask"].eq("").all()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="pass out=FOLDER"):
        quiet(read, "deeppcb", tmp_path / "pcb", out=tmp_path / "file")


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,label\n1.png,maybe\n", "row 0 (1.png): anomalous is 'maybe'"),
        ("image,label\n1.png,\n", "anomalous is ''"),
        ("picture,label\n1.png,0\n", "no column image or img"),
        ("image,colour\n1.png,red\n", "no column anomalous or label"),
        ("image,label\n", "no images"),
    ],
)
def test_csv_damage_is_named(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises((ValueError, LayoutError)) as error:
        read_csv(tmp_path / "a.csv")
    assert message in str(error.value)


def test_csv_labels(tmp_path):
    words = {
        "0": 0,
        "1": 1,
        "OK": 0,
        "ng": 1,
        "Normal": 0,
        "Defective": 1,
        "true": 1,
        "False": 0,
        "good": 0,
        "bad": 1,
        "anomaly": 1,
    }
    (tmp_path / "a.csv").write_text(
        "image, anomalous\n" + "".join(f"{k}.png, {word}\n" for k, word in enumerate(words))
    )
    assert quiet(read_csv, tmp_path / "a.csv").anomalous.tolist() == [bool(value) for value in words.values()]


def test_two_csvs_are_one_too_many(tmp_path):
    build(tmp_path, {"a.csv": "image,label\n", "b.csv": "image,label\n"})
    with pytest.raises(LayoutError, match="expected one CSV, found a.csv, b.csv"):
        read_folder(tmp_path)


def test_order_is_the_same_on_every_machine(tmp_path):
    build(tmp_path / "here", CASES["mvtec"][1])
    first = quiet(read, "mvtec", tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    pd.testing.assert_frame_equal(first, quiet(read, "mvtec", tmp_path / "copy"))
    assert first.image.tolist() == sorted(first.image, key=lambda p: (p.split("/")[0], p.split("/")[1] == "test", p))


# ---- the real files ----


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    "name, size, kinds",
    [
        ("neu_seg", 1640, {"inclusion", "patches", "scratches"}),
        ("deeppcb", 120, {"good", "open", "short", "mousebite", "spur", "copper"}),
        ("crackforest", 118, {"crack"}),
    ],
)
def test_real_sets(name, size, kinds):
    root = SHARED / "data" / name
    if not root.is_dir():
        pytest.skip(f"no real images at {root}: set ZSAD_SHARED to the folder that holds data/")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = read(name, root)
    said = [
        str(warning.message) for warning in caught
    ]  # counts are as expected, no mask is missing; what is set aside is said
    assert len(said) == (name == "crackforest") and all("37 images left out on purpose" in text for text in said)
    assert len(index) == size and set(index.defect) == kinds and detect(root) == name
    assert (index["mask"] != "").sum() == index.anomalous.sum() and check(index[:40]).problem.tolist() == [
        "left_out"
    ] * len(said)
