"""YOLOv8n from its own `.pt` file; an epoch of its own trainer on made-up images."""

from pathlib import Path

import numpy as np
from PIL import Image
from ultralytics import YOLO

import asymswap

NETWORK, INPUT = "yolov8n", (3, 64, 64)
REFERENCE = "yolov8n.pt"


def build():
    yolo = YOLO("yolov8n.yaml")
    yolo.save("yolov8n.pt")
    return yolo.model


def step(conversion, x):
    for part in ("images", "labels"):
        Path("data", part).mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(x):
        pixels = (255 * image.permute(1, 2, 0).numpy()).astype(np.uint8)
        Image.fromarray(pixels).save(f"data/images/{index}.png")
        Path(f"data/labels/{index}.txt").write_text(f"{index} 0.5 0.5 0.5 0.5\n")
    names = {number: f"thing {number}" for number in range(80)}
    Path("data.yaml").write_text(f"path: {Path('data').resolve()}\ntrain: images\nval: images\nnames: {names}\n")
    yolo = asymswap.as_yolo(conversion, "swapped-yolo.pt")
    options = {"workers": 0, "device": "cpu", "plots": False, "optimizer": "SGD", "warmup_epochs": 0}
    yolo.train(data="data.yaml", epochs=1, imgsz=64, batch=2, project=str(Path("runs").resolve()), **options)
    return asymswap.load(yolo.trainer.last)
