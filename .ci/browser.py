"""Say whether the tests in a browser will run: they need a Chromium, found by name or in $VITX_CHROMIUM."""

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
found = os.environ.get("VITX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if found:
    print(f"tests in a browser: {found}")
else:
    print(
        f"tests in a browser are LEFT OUT: none of {', '.join(NAMES)} is on the PATH. "
        "Install one (Debian: apt-get install chromium) or set VITX_CHROMIUM to its path."
    )
