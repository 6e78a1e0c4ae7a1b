"""Tests marked `interpreted` run in a child process, where Triton interprets its kernels.

That is chosen by TRITON_INTERPRET=1 before triton is imported. One child runs all that is selected
of a file and sends its reports, which stand for the reports of the same items here.
"""

import json
import os
import subprocess
import sys
import tempfile

import pytest

_REPORTS = "LORA_KERNELS_TEST_REPORTS"  # in a child: the pipe to write reports to
_children = {}


class Child:
    def __init__(self, items):
        read, write = os.pipe()
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "LORA_KERNELS_BACKEND": "triton",
            "OMP_NUM_THREADS": "1",
            _REPORTS: str(write),
        }
        environment.pop("LORA_KERNELS_PLAN", None)
        config = items[0].config
        tests = [f"{item.path}::{item.nodeid.partition('::')[2]}" for item in items]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:xdist", f"--rootdir={config.rootpath}", *tests]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115, read where the child dies
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[write], stdout=self._output, stderr=self._output
        )
        os.close(write)
        self._lines = os.fdopen(read)
        self._config = config
        config.add_cleanup(self._process.kill)

    def reports_of(self, item):
        """Of its setup, call and teardown."""
        for line in self._lines:
            report = self._config.hook.pytest_report_from_serializable(
                config=self._config, data=json.loads(line)
            )
            if report.nodeid == item.nodeid:
                if isinstance(report.longrepr, list):  # where a test was skipped, as JSON has it
                    report.longrepr = tuple(report.longrepr)
                yield report
                if report.when == "teardown":
                    return
        self._process.wait()
        self._output.seek(0)
        yield pytest.TestReport(
            item.nodeid, item.location, {}, "failed", self._output.read()[-8000:], "call"
        )


def pytest_runtest_protocol(item, nextitem):
    if "interpreted" not in item.keywords or "TRITON_INTERPRET" in os.environ:
        return None
    if item.path not in _children:
        selected = [other for other in item.session.items if other.path == item.path]
        _children[item.path] = Child(selected)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _children[item.path].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What a test of this file that ran here has left to the next one of it.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_configure(config):
    if _REPORTS in os.environ:
        config.pluginmanager.register(_Sender(config, int(os.environ.pop(_REPORTS))))


class _Sender:
    """In a child."""

    def __init__(self, config, pipe):
        self._config, self._pipe = config, os.fdopen(pipe, "w", buffering=1)

    def pytest_runtest_logreport(self, report):
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._pipe.write(json.dumps(data) + "\n")
