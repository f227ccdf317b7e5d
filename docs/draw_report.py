"""Draw docs/images/report.png anew, from a run of the demo: `python docs/draw_report.py runs/demo`.

`spectralmetrics demo --output runs/demo` records the run. Needs the system's Chromium, and the extra `test`.
"""

import sys
import tempfile
from pathlib import Path

from look import browser
from PIL import Image

from spectralmetrics import write_report

TARGET = Path(__file__).parent / "images" / "report.png"
LAYER = "blocks.4.conv2"
WIDTH, LAST = 1200, "#heat"  # in pixels, and the part with which the picture ends


def main(run: str) -> None:
    """Open the report of a run, choose a layer, and take a picture of its first screen."""
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        path = write_report(run, Path(folder) / "report.html")
        page = chromium.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(path.as_uri())
        page.locator("#layer").select_option(label=LAYER)
        page.wait_for_selector("html[data-drawn=all]", state="attached")
        box = page.locator(LAST).bounding_box()
        height = box["y"] + box["height"] + 40
        page.screenshot(path=TARGET, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    Image.open(TARGET).quantize(128).save(TARGET, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
