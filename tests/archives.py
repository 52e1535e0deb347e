"""Fake data sets in the layouts of the true archives, with a few pictures of a few pixels for each class.

Each function fills one folder as DATA_DIR and returns the data set's folder in it. picture: the content of every image.
The classes are all of the true ones where common/datasets.py counts them or knows their names (caltech101, eurosat,
flowers102, imagenet), in cifar10, and by default in dtd, pets and food101; the other sets have a few.

`own` is the layout DIR/train/<class>/*, DIR/test/<class>/* that sets unknown to torchvision are given in, with the
class folders of their archives.
"""

import io
import json
import pickle
import random

import numpy as np
import scipy.io
from PIL import Image

from common import datasets

CALTECH = """Faces Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai
brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill
headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid
revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish
stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat
windsor_chair wrench yin_yang""".split()
TEXTURES = """banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted
fibrous flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled
matted meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled
stained stratified striped studded swirly veined waffled woven wrinkled zigzagged""".split()
PETS = """Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer
British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired
great_pyrenees havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian
pomeranian pug Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx
staffordshire_bull_terrier wheaten_terrier yorkshire_terrier""".split()
FOODS = """apple_pie baby_back_ribs baklava beef_carpaccio beef_tartare beet_salad beignets bibimbap
bread_pudding breakfast_burrito bruschetta caesar_salad cannoli caprese_salad carrot_cake ceviche cheese_plate
cheesecake chicken_curry chicken_quesadilla chicken_wings chocolate_cake chocolate_mousse churros clam_chowder
club_sandwich crab_cakes creme_brulee croque_madame cup_cakes deviled_eggs donuts dumplings edamame
eggs_benedict escargots falafel filet_mignon fish_and_chips foie_gras french_fries french_onion_soup
french_toast fried_calamari fried_rice frozen_yogurt garlic_bread gnocchi greek_salad grilled_cheese_sandwich
grilled_salmon guacamole gyoza hamburger hot_and_sour_soup hot_dog huevos_rancheros hummus ice_cream lasagna
lobster_bisque lobster_roll_sandwich macaroni_and_cheese macarons miso_soup mussels nachos omelette
onion_rings oysters pad_thai paella pancakes panna_cotta peking_duck pho pizza pork_chop poutine prime_rib
pulled_pork_sandwich ramen ravioli red_velvet_cake risotto samosa sashimi scallops seaweed_salad
shrimp_and_grits spaghetti_bolognese spaghetti_carbonara spring_rolls steak strawberry_shortcake sushi tacos
takoyaki tiramisu tuna_tartare waffles""".split()
VARIANTS = ["707-320", "A300B4", "An-12", "F-16A/B", "F/A-18", "BAE 146-200", "Yak-42"]
CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
CIFAR = "apple aquarium_fish lawn_mower sweet_pepper".split()  # of CIFAR-100's 100
OBJECTS = "001.ak47 002.american-flag 015.bonsai-101 257.clutter".split()  # of Caltech256
BIRDSNAP = "Acadian_Flycatcher Bewicks_Wren Black_crowned_Night_Heron".split()
CUB = "001.Black_footed_Albatross 023.Brandt_Cormorant 200.Common_Yellowthroat".split()
WNIDS = "n01440764 n01443537 n03773504".split()  # tench, goldfish, missile: of ImageNet-Sketch and ImageNet-R
PLACES = ["/a/abbey", "/a/apartment_building/outdoor", "/t/theater/indoor_seats", "/y/youth_hostel"]


def encoded(mode="RGB", size=(4, 3), color=0, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded(kind="JPEG")


def write(path, content=JPEG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


def fill_tree(folder, classes, count, pattern="{name}_{i}.jpg", picture=JPEG):
    """folder/<class>/<count files>"""
    for name in classes:
        for i in range(1, count + 1):
            write(folder / name / pattern.format(name=name, i=i), picture)
    return folder


def caltech101(root, per_class=10, picture=JPEG):
    """100 categories and the two that are left out."""
    folder = root / "caltech101" / "101_ObjectCategories"
    return fill_tree(folder, [*CALTECH, "Faces_easy", "BACKGROUND_Google"], per_class, "image_{i:04d}.jpg", picture)


def eurosat(root, per_class=20, picture=JPEG):
    return fill_tree(root / "eurosat" / "2750", datasets.EUROSAT.split(), per_class, picture=picture)


def dtd(root, classes=TEXTURES, picture=JPEG):
    """One image of each class in each of the three splits."""
    base = root / "dtd" / "dtd"
    fill_tree(base / "images", classes, 3, "{name}_{i:04d}.jpg", picture)
    for i, split in enumerate(("train", "val", "test"), 1):
        write(base / "labels" / f"{split}1.txt", "".join(f"{name}/{name}_{i:04d}.jpg\n" for name in classes))
    return base


def pets(root, classes=PETS, picture=JPEG):
    """Two images of each class in both splits."""
    base = root / "oxford-iiit-pet"
    for start, split in ((1, "trainval"), (11, "test")):
        lines = []
        for label, name in enumerate(classes, 1):
            for i in range(start, start + 2):
                write(base / "images" / f"{name}_{i}.jpg", picture)
                lines.append(f"{name}_{i} {label} 1 1\n")
        random.Random(0).shuffle(lines)
        write(base / "annotations" / f"{split}.txt", "".join(lines))
    return base


def flowers102(root, picture=JPEG):
    """102 classes, one image of each in each of the three splits.

    The two .mat files are not those whose MD5 torchvision.datasets.flowers102.check_integrity wants.
    """
    base, labels, ids = root / "flowers-102", [], {"trnid": [], "valid": [], "tstid": []}
    for i in range(1, 102 * 3 + 1):
        write(base / "jpg" / f"image_{i:05d}.jpg", picture)
        labels.append((i - 1) // 3 + 1)
        list(ids.values())[i % 3].append(i)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([labels])})
    scipy.io.savemat(base / "setid.mat", {key: np.array([value]) for key, value in ids.items()})
    return base


def food101(root, classes=FOODS, per_class=1, picture=JPEG):
    """per_class images of each class in both splits."""
    base, numbers = root / "food-101", range(1, 2 * per_class + 1)
    fill_tree(base / "images", classes, 2 * per_class, "100{i}.jpg", picture)
    for split, of in (("train", numbers[:per_class]), ("test", numbers[per_class:])):
        listed = {name: [f"{name}/100{i}" for i in of] for name in reversed(classes)}
        write(base / "meta" / f"{split}.json", json.dumps(listed))
    return base


def fgvc_aircraft(root, picture=JPEG):
    """One image of each of seven variants in each of the three splits; the file's order of classes."""
    base, number = root / "fgvc-aircraft-2013b" / "data", 1000000
    write(base / "variants.txt", "".join(f"{v}\n" for v in VARIANTS))
    for split in ("train", "val", "test"):
        lines = []
        for variant in VARIANTS:
            number += 1
            write(base / "images" / f"{number}.jpg", picture)
            lines.append(f"{number} {variant}\n")
        write(base / f"images_variant_{split}.txt", "".join(lines))
    return base


def cars(root, picture=JPEG):
    """Two images of two classes in both splits."""
    base = root / "stanford_cars"
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros((1, 4), dtype=[("class", object), ("fname", object)])
        for i in range(4):
            write(base / f"cars_{split}" / f"{i + 1:05d}.jpg", picture)
            rows[0, i] = (i % 2 + 1, f"{i + 1:05d}.jpg")
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(base / file, {"annotations": rows})
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    return base


def sun397(root, picture=JPEG):
    """Ten images of four places, without the partition files."""
    base = root / "SUN397"
    write(base / "ClassName.txt", "".join(f"{p}\n" for p in PLACES))
    for place in PLACES:
        for i in range(10):
            write(base / place[1:] / f"sun_{place[-1]}{i}.jpg", picture)
    return base


def imagenet(base, positions, splits=("train", "val"), per_class=1, picture=JPEG):
    """base/<split>/<wnid>/*.JPEG of the classes at these positions -> the WordNet ids of all 1,000."""
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    for split in splits:
        for i in positions:
            for k in range(per_class):
                number = f"_{k}" if k else ""
                write(base / split / wnids[i] / f"{wnids[i]}_{split}{number}.JPEG", picture)
    return wnids


def stl10(root, per_class=1):
    """Labels 1 to 10 and pixels column by column, per_class random images of each class in both splits."""
    base, labels = root / "stl10_binary", bytes(range(1, 11)) * per_class
    for split in ("train", "test"):
        pixels = np.random.default_rng(len(split)).integers(256, size=(len(labels), 3, 96, 96), dtype=np.uint8)
        write(base / f"{split}_X.bin", pixels.tobytes())
        write(base / f"{split}_y.bin", labels)
    write(base / "class_names.txt", "\n".join("airplane bird car cat deer dog horse monkey ship truck".split()))
    return base


def medmnist(root, name, classes, per_class=1):
    """<name>.npz of 28 x 28 pixels, per_class random images of each class in each of the three splits."""
    labels, arrays = np.repeat(np.arange(classes, dtype=np.uint8), per_class)[:, None], {}
    for split in ("train", "val", "test"):
        shape = (len(labels), 28, 28, 3)
        arrays[f"{split}_images"] = np.random.default_rng(len(split)).integers(256, size=shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = labels
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / f"{name}.npz", **arrays)
    return root


def cifar10(root, per_class=2):
    """The python version: pickled dicts of rows and labels; per_class images of each class in each of six files."""
    base, names = root / "cifar-10-batches-py", datasets.CIFAR10
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels, labels = cifar_rows(len(names), per_class)
        files = [f"{i}.png" for i in range(len(labels))]
        write(base / file, pickle.dumps({"data": pixels, "labels": labels, "filenames": files}))
    meta = {"label_names": names, "num_cases_per_batch": len(labels), "num_vis": 3072}
    write(base / "batches.meta", pickle.dumps(meta))
    return base


def cifar100(root, names=CIFAR, per_class=2):
    """As cifar10, two files, with the labels of the classes and of groups of classes."""
    base = root / "cifar-100-python"
    for file in ("train", "test"):
        pixels, labels = cifar_rows(len(names), per_class)
        content = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * len(labels), "batch_label": file}
        write(base / file, pickle.dumps(content | {"filenames": [f"{i}.png" for i in range(len(labels))]}))
    write(base / "meta", pickle.dumps({"fine_label_names": names, "coarse_label_names": ["things"]}))
    return base


def cifar_rows(n_classes, per_class):
    """uint8 [N, 3072], N labels; the same images in every file"""
    labels = [c for c in range(n_classes) for _ in range(per_class)]
    return np.random.default_rng(0).integers(256, size=(len(labels), 3072), dtype=np.uint8), labels


def own(root, names, splits=("train", "test"), per_class=2, picture=JPEG):
    for split in splits:
        fill_tree(root / split, names, per_class, picture=picture)
    return root
