"""Runs the main job: python launch.py --config=configs/household.py [--config.a.b=x].

With --plan it only says how much memory the config needs on each device.
"""

import os
import sys

# XLA on CPU allocates a program's temporary arrays anew at every call, and the kernel has to hand
# over and clear every page. With huge pages that costs a fifth less time in training. glibc reads
# this when a process starts, so the process starts once more.
if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from absl import app, flags, logging
from ml_collections import config_flags

from w2sjax import parallel, pipeline, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with an argument: file.py:arg."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where all results go, a bucket (gs://...) too; runs/<config.name> by default."
)
_START_OVER = flags.DEFINE_bool(
    "start_over", False, "Delete what another config left in the workdir."
)
_PLAN = flags.DEFINE_bool("plan", False, "Print the memory needed per device; start nothing.")
_PLAN_DEVICES = flags.DEFINE_integer(
    "plan_devices", None, "How many devices --plan assumes; those that are there by default."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, where several processes share the work; TPU pods and SLURM need none "
    "of these three flags.",
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}; settings are flags like --config.seed=1"
        )
    if _PLAN_DEVICES.value is not None and not _PLAN.value:
        raise app.UsageError("--plan_devices says what --plan assumes; give --plan too")
    logging.set_verbosity(logging.WARNING)
    workdir = _WORKDIR.value or f"runs/{_CONFIG.value.name}"
    try:
        if _PLAN.value:
            pipeline.plan(_CONFIG.value, num_devices=_PLAN_DEVICES.value)
            return
        parallel.start_processes(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        pipeline.run(_CONFIG.value, workdir, start_over=_START_OVER.value)
    except pipeline.USER_ERRORS as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
    except train.TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)
