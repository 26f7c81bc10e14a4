"MVTec AD 2's parts without labels, and the folders of anomalib: what can go wrong says so."

import warnings

import numpy as np
import pytest
from PIL import Image

from zsad_nb.data.folder import read_anomalib
from zsad_nb.data.index import load_index, make_index, save_index
from zsad_nb.data.listing import LayoutError
from zsad_nb.data.meta import write_meta
from zsad_nb.data.readers import read
from zsad_nb.data.sets import lighting
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.methods.base import create
from zsad_nb.training.fit import fit


def save(path, value=100, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 200, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def ad_2(root):
    "One class of MVTec AD 2 as it lies on disk."
    names = [
        "train/good/000_regular",
        "validation/good/000_regular",
        "test_public/good/000_overexposed",
        "test_public/bad/000_shift_2",
        "test_private/000_regular",
        "test_private/001_regular",
        "test_private_mixed/000_mixed",
    ]
    for number, name in enumerate(names):
        save(root / f"can/{name}.png", number)
    mask = np.zeros((20, 24), np.uint8)
    mask[3:9, 4:12] = 255
    place = root / "can/test_public/ground_truth/bad/000_shift_2_mask.png"
    place.parent.mkdir(parents=True)
    Image.fromarray(mask).save(place)
    return root


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def test_parts_without_labels_are_looked_at_and_not_measured(tmp_path):
    root = ad_2(tmp_path / "ad2")
    index = quiet(read, "mvtec_ad_2", root, part="private")
    assert index["split"].tolist() == ["unlabelled"] * 2 and index["defect"].eq("").all()
    assert lighting(index).tolist() == ["regular", "regular"]
    assert lighting(quiet(read, "mvtec_ad_2", root, part="private_mixed")).tolist() == ["mixed"]
    assert quiet(read, "mvtec_ad_2", root, valid="train")["split"].value_counts().to_dict() == dict(train=2, test=2)
    method = create("self_distance", image_size=48)
    sentence = r"2 of 2 images have no label \(first: can/test_private/000_regular.png\)"
    with pytest.raises(ValueError, match=sentence + ": no metric can be computed; look at them with predict"):
        evaluate(method, index, progress=False)
    with pytest.raises(ValueError, match=sentence + ": nothing can be learned"):
        fit(create("visualad", image_size=48), index)
    with pytest.raises(ValueError, match=sentence + ": no threshold can be made"):
        Inspector(method).calibrate(index)
    with pytest.raises(ValueError, match=sentence + ": a meta.json has no place"):
        write_meta(index)
    table = Inspector(method).predict(index, progress=False)
    assert len(table) == 2 and table["score"].notna().all()
    again = load_index(save_index(index, tmp_path / "private.csv"))
    assert again["split"].tolist() == ["unlabelled"] * 2 and again["image"].tolist() == index["image"].tolist()


@pytest.mark.parametrize(
    "change", [dict(anomalous=True), dict(defect="good"), dict(defect="crack"), dict(mask="m.png")]
)
def test_a_row_without_a_label_states_none(tmp_path, change):
    row = dict(image="a.png", category="can", split="unlabelled", anomalous=False, defect="", mask="") | change
    with pytest.raises(ValueError, match="row 0 .*split is 'unlabelled', so anomalous must be False"):
        make_index([row], tmp_path, "ad2")


def test_ad_2_half_of_its_masks_an_empty_folder_an_unknown_part(tmp_path):
    root = ad_2(tmp_path / "ad2")
    save(root / "can/test_public/bad/001_regular.png", 50)
    with pytest.warns(UserWarning, match="1 anomalous images have no mask .*001_regular.png"):
        read("mvtec_ad_2", root, valid="skip")
    (root / "can/test_public/ground_truth/bad/000_shift_2_mask.png").unlink()
    with pytest.raises(LayoutError, match="none of the 2 anomalous images has a mask"):
        read("mvtec_ad_2", root)
    assert quiet(read, "mvtec_ad_2", root, masks=False)["mask"].eq("").all()
    (tmp_path / "void").mkdir()
    with pytest.raises(LayoutError, match="no images: expected <class>/train/good.*is empty"):
        read("mvtec_ad_2", tmp_path / "void")
    with pytest.raises(LayoutError, match="expected <class>/test_private/"):
        read("mvtec_ad_2", tmp_path / "void", part="private")
    with pytest.raises(ValueError, match="part='secret'; it must be 'public'"):
        read("mvtec_ad_2", root, part="secret")
    with pytest.raises(ValueError, match="unknown data set 'mvtec_ad3'; did you mean"):
        read("mvtec_ad3", root)


def shop(root):
    for number in range(10):
        save(root / f"good/{number}.png", number)
    for name in ("scratch/0", "scratch/1", "dent/0"):
        save(root / f"bad/{name}.png", len(name) + int(name[-1]) + 60)
        save(root / f"mask/{name}.png", 5)
    return root


def test_anomalib_in_all_its_spellings(tmp_path):
    root = shop(tmp_path / "shop")
    index = read_anomalib(root, "good", "bad", mask_dir="mask")
    assert index["split"].value_counts().to_dict() == dict(train=8, test=5)  # a fifth of the normal images
    assert sorted(index["defect"][index["anomalous"]]) == ["dent", "scratch", "scratch"]
    assert (index["mask"][index["anomalous"]] == index["image"][index["anomalous"]].str.replace("bad", "mask")).all()
    absolute = read_anomalib(root, [root / "good"], [root / "bad"], mask_dir=root / "mask", extensions=".PNG")
    assert absolute.values.tolist() == index.values.tolist()
    lists = read_anomalib(root, "good", ["bad/scratch", "bad/dent"], mask_dir=["mask/scratch", "mask/dent"])
    assert sorted(lists["mask"]) == sorted(index["mask"])
    alone = read_anomalib(root, "good")
    assert alone["split"].eq("train").all() and len(alone) == 10
    other = read_anomalib(root, "good", "bad", normal_split_ratio=0.5, masks=False)
    assert other["split"].value_counts().to_dict() == dict(test=8, train=5) and other["mask"].eq("").all()
    held = set(index["image"][(index["split"] == "test") & ~index["anomalous"]])
    assert held < set(other["image"][(other["split"] == "test") & ~other["anomalous"]])  # by name, not by chance


def test_anomalib_what_is_wrong_is_named(tmp_path):
    root = shop(tmp_path / "shop")
    (root / "empty").mkdir()
    for options, message in [
        (dict(normal_dir="goods"), "expected normal_dir='goods'; found bad/, empty/, good/, mask/"),
        (dict(normal_dir="good", abnormal_dir="empty"), "abnormal_dir: expected images in or below it; .*is empty"),
        (dict(normal_dir="good", mask_dir=["mask", "nowhere"]), "expected mask_dir='nowhere'"),
        (dict(normal_dir=[]), "expected normal_dir"),
        (dict(normal_dir="good", extensions=(".bmp",)), "with the extensions .bmp"),
    ]:
        with pytest.raises(LayoutError, match=message):
            read_anomalib(root, **options)
    with pytest.raises(ValueError, match="normal_split_ratio=2; it must be a share"):
        read_anomalib(root, "good", normal_split_ratio=2)
    with pytest.raises(ValueError, match="extensions=''"):
        read_anomalib(root, "good", extensions="")
    (root / "mask/scratch/1.png").unlink()
    with pytest.warns(UserWarning, match="1 anomalous images have no mask .first: bad/scratch/1.png"):
        index = read_anomalib(root, "good", "bad", mask_dir="mask")
    assert index.loc[index["image"] == "bad/scratch/0.png", "mask"].item() == "mask/scratch/0.png"  # nothing shifted
    (root / "mask/dent/0.png").unlink()
    (root / "mask/dent").rmdir()
    (root / "mask/scratch/0.png").rename(root / "mask/0.png")
    (root / "mask/scratch").rmdir()
    with pytest.raises(LayoutError, match="mask/0.png belongs by name to bad/dent/0.png and bad/scratch/0.png"):
        read_anomalib(root, "good", "bad", mask_dir="mask")
    with pytest.raises(LayoutError, match="bad/dent/0.png lies in a folder of normal and in one of abnormal images"):
        read_anomalib(root, ["good", "bad/dent"], ["bad/dent", "bad/scratch"], normal_split_ratio=0)
