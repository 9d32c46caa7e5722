"""One build by make and recc, timed."""

import os
import subprocess
import time

from tree import PATH


def build(tree, address, places, jobs, log, **more):
    """Builds what is out of date in `tree`, through the server at `address`; returns seconds.
    `more` is added to the environment."""
    environment = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": os.environ.get("HOME", "/"),
        "RECC_SERVER": address,
        "RECC_LINK": "1",
        **more,
    }
    command = ["make", "-C", tree.folder, f"-j{jobs}", f"RECC={places.tools / 'bin/recc'}"]
    path = places.run / f"{log}.log"
    with open(path, "wb") as output:
        began = time.monotonic()
        code = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment).returncode
        took = time.monotonic() - began
    if code != 0:
        end = "\n".join(path.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"a build failed: {path}\n{end}")
    return took
