"""buildbox-casd and primed, started for one measurement and ended with it."""

import json
import os
import subprocess
import time
from pathlib import Path


class Places:
    """Where things are; `scripts/lib.sh` knows."""

    def __init__(self, arguments):
        self.tools = Path(arguments.tools).resolve()
        self.primed = Path(arguments.primed).resolve()
        self.worker = Path(arguments.worker).resolve()
        self.crates = Path(arguments.crates).resolve()
        self.run = Path(arguments.run).resolve()
        self.sockets = Path(arguments.sockets).resolve()
        self.memo = Path(arguments.memo).resolve()
        for folder in ("results", "blobs"):
            (self.memo / folder).mkdir(parents=True, exist_ok=True)


class Server:
    """A process with a log, which is ready when `ready` says so."""

    def __init__(self, places, name, command, environment=None):
        self.places = places
        self.name = name
        self.socket = places.sockets / name
        self.log = places.run / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | (environment or {})
            )
        deadline = time.monotonic() + 60
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{name} did not start; its log:\n{self.log.read_text()}")
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Asks it to end; kills it after 10 s."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def address(self):
        """What clients are told."""
        return f"unix:{self.socket}"


class Casd(Server):
    """An empty buildbox-casd, of a simulated cluster if `times` (milliseconds: a compile's, any
    other action's) are given, else one that executes on this machine."""

    def __init__(self, places, name, slots, times=None):
        self.cache = places.run / f"{name}.cache"
        self.late = places.run / f"{name}.late"
        runner = places.tools / "bin/buildbox-run-hosttools"
        environment = {"BUILDBOX_STAGER": "copy-or-link"}
        if times:
            environment |= {
                "CLUSTER_MEMO": str(places.memo),
                "CLUSTER_STORE": str(self.cache / "cas/objects"),
                "CLUSTER_RUNNER": str(runner),
                "CLUSTER_LATE": str(self.late),
                "CLUSTER_COMPILE_MS": str(times[0]),
                "CLUSTER_OTHER_MS": str(times[1]),
            }
            runner = places.worker
        bind = f"unix:{places.sockets / name}"
        command = [places.tools / "bin/buildbox-casd", f"--buildbox-run={runner}", f"--jobs={slots}", "--bind", bind]
        super().__init__(places, name, [*command, self.cache], environment)

    def ready(self):
        upload = [self.places.tools / "bin/casupload", "--retry-limit=0", f"--remote={self.address()}", __file__]
        return self.socket.exists() and subprocess.run(upload, capture_output=True).returncode == 0

    def stored_bytes(self):
        """Bytes of all blobs that it holds."""
        return sum(path.stat().st_size for path in (self.cache / "cas/objects").glob("*/*"))

    def late_results(self):
        """How many results had to be worked out that a simulated cluster should have known."""
        return len(self.late.read_text().splitlines()) if self.late.exists() else 0

    def result(self, action):
        """The encoded result of the action with this hash."""
        return (self.cache / "actioncache/objects" / action[:2] / action[2:]).read_bytes()


class Primed(Server):
    """primed in front of a casd, with nothing recorded."""

    def __init__(self, places, name, casd, options):
        self.admin = f"unix:{places.sockets / name}.admin"
        command = [places.primed, "serve", "--listen", f"unix:{places.sockets / name}", "--admin", self.admin]
        command += ["--state-dir", places.run / f"{name}.state", "--upstream", casd.address(), *options]
        super().__init__(places, name, command)

    def ask(self, *arguments):
        """What one of primed's commands prints."""
        command = [self.places.primed, *arguments, "--admin", self.admin]
        return subprocess.run(command, capture_output=True, text=True)

    def ready(self):
        return self.ask("status").returncode == 0

    def newest_build(self):
        """What primed did for the newest build, once it is quiet."""
        if self.ask("wait", "--timeout", "120").returncode != 0:
            raise SystemExit(f"{self.name} is still busy after 120 s:\n{self.ask('status').stdout}")
        return json.loads(self.ask("status", "--json").stdout)["builds"][0]
