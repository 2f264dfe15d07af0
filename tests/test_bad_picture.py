"""A bad picture, crop or folder of LivePortrait is one line and harms no file."""
import pytest
from PIL import Image

from bad import cut, folder, good, refused, run, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("path", ["nobody.jpg", "text.txt", "videos"])
def test_what_is_no_picture_is_named(refused, path):
    refused(f"portrait --image_path={path}", f"{path}: no picture could be read")


def test_an_empty_picture(refused):
    write("me.png", "")
    refused("portrait", "me.png: no picture could be read")


def test_a_picture_cut_short(refused):
    cut("me.png", 90)
    refused("portrait", "me.png: no picture could be read")


def test_a_picture_that_would_fill_the_memory(refused):
    write("me.png", b"P4 20000 20000\n")           # all of it but the pixels
    refused("portrait", "me.png: no picture could be read", "exceeds limit of 250000000 pixels")


def test_a_picture_without_a_white(refused):
    """Of floats nobody knows what is white."""
    Image.new("F", (64, 64), 1e20).save("me.tif")
    words = "me.tif: no picture could be read", "(it has floats of grey"
    refused("portrait --image_path=me.tif", *words)


def test_a_picture_of_one_pixel(refused):
    Image.new("RGB", (1, 1)).save("me.png")
    refused("portrait", "16 or more, inside 1 x 1")


@pytest.mark.parametrize("crop", ["40,0,30", "-1,0,30", "left,top,30", "0,0,15", "0,30"])
def test_a_crop_that_is_no_square_of_the_picture(refused, crop):
    refused(f"portrait --crop={crop}", f"crop {crop}: should be x,y,size", "64 x 48")


def test_no_folder_of_live_portrait(refused):
    refused("portrait", "appearance_feature_extractor.pth: not a readable checkpoint")


def test_a_file_for_the_folder_of_live_portrait(refused):
    refused("portrait --weights=text.txt", "text.txt")


