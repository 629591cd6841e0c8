"""The contact sheet: the pixels of training under their names, of slides and of pictures, and diagnoses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from histoscale.augment import augment, block_masks
from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.augment.sheet import draw_sheet
from histoscale.augment.show import main, regions_of
from histoscale.config.recipe import Recipe
from histoscale.errors import SlideError
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.slide import SlideInfo
from histoscale.slides.synthetic import make_slides

SMALL = [
    "model.arch=vit_test14",
    "data.region_px=128",
    "crops.global_px=56",
    "crops.local_px=28",
    "crops.local_count=2",
]
RECIPE = Recipe.model_validate(
    {
        "model": {"arch": "vit_test14"},
        "data": {"region_px": 128},
        "crops": {"global_px": 56, "local_px": 28, "local_count": 2},
    }
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slides(tmp_path_factory.mktemp("slides"), count=1)[0].path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (130, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


class BareGlass:
    """A slide without tissue."""

    info = SlideInfo(4000, 3000, mpp=0.5, mpp_origin="tiff", vendor="test", level_downsamples=(1.0,))

    def read(self, x_px0: float, y_px0: float, side_px: int, mpp: float) -> np.ndarray:
        return np.full((side_px, side_px, 3), 245, np.uint8)

    def thumbnail(self, um_per_px: float) -> np.ndarray:
        return np.full((188, 250, 3), 245, np.uint8)

    def verify(self) -> None: ...

    def close(self) -> None: ...


def options(*others: str) -> list[str]:
    return [*(part for override in SMALL for part in ("--set", override)), *others]


def holds(sheet: np.ndarray, image: np.ndarray) -> int:
    """How often an image stands in the sheet, pixel by pixel."""
    height, width, _ = image.shape
    rows, columns = np.nonzero((sheet[: 1 - height, : 1 - width] == image[0, 0]).all(axis=-1))
    return sum(
        bool((sheet[row : row + height, column : column + width] == image).all())
        for row, column in zip(rows, columns, strict=True)
    )


def test_a_sheet_holds_what_teacher_and_student_see() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    ids = np.array([5, 900])
    sheet = np.asarray(draw_sheet(tiles, ids, RECIPE))
    views = augment(torch.from_numpy(tiles), ids, RECIPE)
    masks = block_masks(ids, RECIPE.seed, 4, RECIPE.loss).reshape(4, 4, 4)
    assert views.local_crops is not None

    def pixels(crop: torch.Tensor) -> np.ndarray:
        values = crop.permute(1, 2, 0).numpy() * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
        return np.rint(255 * values.clip(0, 1)).astype(np.uint8)

    for crop, mask in zip(views.global_crops, masks, strict=True):
        seen = pixels(crop)
        hidden = seen.copy()
        for row, column in np.argwhere(mask):
            hidden[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 128
        assert holds(sheet, seen) == (1 if mask.any() else 2)
        assert holds(sheet, hidden) == (1 if mask.any() else 2)
    for crop in views.local_crops:
        assert holds(sheet, pixels(crop)) == 1
    assert (sheet[:18] < 128).any()  # the names


def test_a_sheet_without_local_crops_is_narrower() -> None:
    tiles = np.zeros((1, 128, 128, 3), np.uint8)
    without = RECIPE.model_copy(update={"crops": RECIPE.crops.model_copy(update={"local_count": 0})})
    assert draw_sheet(tiles, np.arange(1), without).width < draw_sheet(tiles, np.arange(1), RECIPE).width


def test_regions_of_a_slide_are_of_tissue_and_at_their_scale(slide_file: Path) -> None:
    slide = open_slide(slide_file)
    tiles = regions_of(slide, RECIPE, 6, 1.0)
    assert tiles.shape == (6, 128, 128, 3)
    assert all((tile.max(axis=-1).astype(int) - tile.min(axis=-1)).mean() > 10 for tile in tiles)  # glass has no colour
    assert len({tile.tobytes() for tile in tiles}) == 6
    assert np.array_equal(tiles, regions_of(slide, RECIPE, 6, 1.0))
    with pytest.raises(SlideError, match="slide is smaller than a region"):
        regions_of(slide, RECIPE, 1, 19.0)
    slide.close()


def test_a_slide_of_glass_has_nothing_to_show() -> None:
    with pytest.raises(SlideError, match="no tissue was found"):
        regions_of(BareGlass(), RECIPE, 1, 0.5)


def test_a_picture_is_cut_up_and_the_same_command_draws_the_same(picture: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, more in zip(files, ([], [], ["--seed", "7"]), strict=True):
        main(options("--slide", str(picture), "--tiles", "3", "--out", str(file), *more))
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other
    with Image.open(files[0]) as sheet:
        assert sheet.height == 18 + 6 + 3 * (56 + 6)


def test_a_slide_is_drawn_from_a_recipe_file(
    slide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {arch: vit_test14}\ndata: {region_px: 128}\ncrops: {global_px: 56, local_px: 28}\n")
    out = tmp_path / "sheet.png"
    main(["--recipe", str(recipe), "--slide", str(slide_file), "--mpp", "1", "--tiles", "2", "--out", str(out)])
    with Image.open(out) as sheet:
        assert capsys.readouterr().out == f"{out}: 2 tiles, {sheet.width} x {sheet.height} px\n"


def test_without_a_slide_one_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    main(options("--tiles", "1", "--out", str(out)))
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)[24:80, 6:62].astype(int)
    assert pixels.max(axis=-1).mean() - pixels.min(axis=-1).mean() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "crops.windows=1"], "crops.windows is not a field"),
        (["--recipe", "/nonexistent.yaml"], "cannot be read: No such file"),
        (["--slide", "/nonexistent/secret.png"], "the picture cannot be read"),
        (["--slide", "/nonexistent/secret.svs"], "slide file is missing"),
        (["--set", "data.region_px=140"], "the picture is smaller than a region"),
        (["--out", "/nonexistent/sheet.png"], "the picture cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_a_diagnosis(
    arguments: list[str], message: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = [] if "--slide" in arguments else ["--slide", str(picture)]
    with pytest.raises(SystemExit) as caught:
        main(options(*slide, *arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert "secret" not in error


@pytest.mark.parametrize("arguments", [["--tiles", "0"], ["--tiles", "x"], ["--mpp", "nan"], ["--slide-mpp", "fine"]])
def test_options_out_of_range_say_what_was_expected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"got '{arguments[1]}'" in capsys.readouterr().err
