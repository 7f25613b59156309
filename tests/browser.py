"""A real headless Chromium for tests, and where their screenshots go."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

SCREENSHOTS = Path(__file__).parent.parent / "build" / "screenshots"
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def find_chromium():
    """Paths of a browser and its driver; skips the test where there are none, except on CI, which must have them."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        reason = "no chromium and chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("MOELORA_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    return browser, driver


@contextlib.contextmanager
def chromium(profile, width=1280, height=900, dark=False):
    """A browser window of that size with a fresh profile in the folder `profile`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver_path = find_chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (*QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        phone = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        if width < 600:
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def screenshot(driver, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
