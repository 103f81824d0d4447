"""Real photographs that installed packages ship, in four sets that share none.

    python examples/imagenet/photographs.py     lists what is found

Nothing is downloaded; a package that is missing is named with the command that installs it.
"""

import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

SMALLEST = 200  # pixels of the shorter side: below are icons
Named = tuple[str, Image.Image]


@dataclass(frozen=True)
class Source:
    """Photographs of one package. read: yields names and images; raises FileNotFoundError."""

    title: str
    install: str
    part: str  # "calibration", "validation", "evaluation" or "unseen"
    read: Callable[[], Iterator[Named]]


def _site(*parts: str) -> Path:
    return Path(sysconfig.get_paths()["purelib"], *parts)


def _files(folder: str, pattern: str, names: str = "") -> Callable[[], Iterator[Named]]:
    """Files of a folder of an installed Python package, or of the file system if absolute."""

    def read() -> Iterator[Named]:
        places = [Path(folder)] if folder.startswith("/") else [Path(p, folder) for p in sys.path]
        found = next((sorted(p.glob(pattern)) for p in places if any(p.glob(pattern))), [])
        for path in found:
            if not names or path.stem in names.split():
                yield path.name, Image.open(path).convert("RGB")

    return read


def _packed(archive: str, skip: tuple[int, ...] = ()) -> Callable[[], Iterator[Named]]:
    """The WebP photographs inside a Qt resource file of GCompris, in its order.

    A RIFF container says how long it is, so that they are found without the file's own index.
    """

    def read() -> Iterator[Named]:
        content = Path("/usr/share/gcompris-qt/rcc", f"{archive}.rcc").read_bytes()
        place, number = content.find(b"RIFF"), 0
        while place >= 0:
            size = struct.unpack("<I", content[place + 4 : place + 8])[0] + 8
            if content[place + 8 : place + 12] == b"WEBP":
                image = Image.open(BytesIO(content[place : place + size]))
                if image.mode == "RGB" and min(image.size) >= SMALLEST:
                    if number not in skip:
                        yield f"{archive}:{number}", image
                    number += 1
            place = content.find(b"RIFF", place + 4)

    return read


GCOMPRIS = "apt-get install gcompris-qt-data"
OPENCV, DOCUMENTS = (
    "apt-get install --no-install-recommends opencv-doc",
    "/usr/share/doc/opencv-doc",
)
SOURCES = (
    Source("GCompris 3.1, things to sort", GCOMPRIS, "calibration", _packed("categorization")),
    Source(
        "MATE backgrounds 1.26, nature", "apt-get install mate-backgrounds", "calibration",
        _files("/usr/share/backgrounds/mate/nature", "*.jpg"),
    ),
    Source(
        "GCompris 3.1, monuments", GCOMPRIS, "validation",
        _packed("explore_monuments", skip=(11, 39, 46)),  # those are among the things to sort
    ),
    Source(
        "foolbox 3.3.4, labelled ImageNet photographs", "pip install --no-deps foolbox",
        "evaluation", _files("foolbox/data", "imagenet_*.jpg"),
    ),
    Source("GCompris 3.1, animals behind a cloth", GCOMPRIS, "evaluation", _packed("erase")),
    Source(
        "GCompris 3.1, farm animals", GCOMPRIS, "evaluation", _packed("explore_farm_animals")
    ),
    Source(
        "GCompris 3.1, animals of the world", GCOMPRIS, "evaluation",
        _packed("explore_world_animals"),
    ),
    Source(
        "GCompris 3.1, music of the world", GCOMPRIS, "evaluation", _packed("explore_world_music")
    ),
    Source(
        "scikit-image 0.26", "pip install --no-deps scikit-image", "evaluation",
        _files(
            "skimage/data", "*",
            "astronaut brick camera chelsea coffee coins grass gravel motorcycle_left rocket",
        ),
    ),
    Source("scikit-learn 1.9", "pip install scikit-learn", "evaluation",
           _files("sklearn/datasets/images", "*.jpg")),
    Source(
        "OpenCV 4.6, samples", OPENCV, "unseen",
        _files(
            f"{DOCUMENTS}/examples", "*/*.[jp][pn]g",
            "aero1 aloeL apple baboon basketball1 board box_in_scene building butterfly chicky_512 "
            "ela_original fruits home leuvenA licenseplate_motion messi5 orange rubberwhale1 "
            "squirrel_cls stuff scenetext01 scenetext02 scenetext03 scenetext04 scenetext05 "
            "scenetext06",
        ),
    ),
    Source(
        "OpenCV 4.6, regions", OPENCV, "unseen", _files(f"{DOCUMENTS}/examples/hfs/data", "*.jpg")
    ),
    Source(
        "OpenCV 4.6, documentation", OPENCV, "unseen",
        _files(
            f"{DOCUMENTS}/opencv4/html", "**/*.jpg",
            "227943776_1 detect_test1 detect_test2 fusion_mertens space_shuttle astra_color "
            "pexels_double_decker_bus retina_TreeHdr_small handDst bicubicOutput",
        ),
    ),
    Source(
        "Lomiri wallpapers", "apt-get install lomiri-wallpapers-16.04 lomiri-wallpapers-20.04",
        "unseen",
        _files(
            "/usr/share/backgrounds", "*_by_*.jpg",
            "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace "
            "Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi "
            "free_by_Peter_Nerlich friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich "
            "life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
            "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi Kleiber_by_Lukas_Baubkus",
        ),
    ),
)  # fmt: skip


def photographs(part: str) -> list[Named]:
    """Names and photographs of a set. Raises FileNotFoundError that says what to install."""
    found: list[Named] = []
    for source in SOURCES:
        if source.part == part:
            try:
                some = list(source.read())
            except FileNotFoundError:
                some = []
            if not some:
                raise FileNotFoundError(f"no photographs of {source.title}: {source.install}")
            found += some
    return found


def central(image: Image.Image, size: int = 224) -> Image.Image:
    """The middle of a photograph whose shorter side becomes 8/7 of ``size``."""
    scale = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


if __name__ == "__main__":
    for kind in ("calibration", "validation", "evaluation", "unseen"):
        names = [name for name, _ in photographs(kind)]
        print(f"{kind}: {len(names)}: {', '.join(names)}")
