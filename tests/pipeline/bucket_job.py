"""The main job, tiny, with its workdir in a bucket; a program for test_bucket_job.py.

`python bucket_job.py DIRECTORY` runs it until it is cut off in a training, again until it is cut
off in the rollouts, again to its end, and once more; each time with nothing but the bucket, as on
another machine. The last run is in a copy of the bucket's files in DIRECTORY. Prints what each run
trained and sampled.
"""

import os
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / "train"), str(Path(__file__).parents[2])]

import bucket
from etils import epath

from configs.household import get_config
from w2sjax import pipeline, report, sampling, train
from w2sjax.pipeline import episodes
from w2sjax.pipeline.storage import files_below

WORKDIR = epath.Path("gs://bucket/deep/run")
REAL_FIT = train.fit


def tiny():
    c = get_config("smoke").copy_and_resolve_references()
    with c.unlocked():
        c.methods = ("sft_all",)
        c.evaluate.modes = ("sampled",)
        c.rollouts.per_task = 2
        c.sampler.slots = 8
        c.sampler.block = 8
        c.models.export = True
        c.pretrain.tasks = 60
        c.pretrain.weak_steps = c.pretrain.strong_steps = 12
        c.weak.steps = c.train.steps = 5
        c.train.checkpoint_every = 5
    return c


class Watch:
    """Stands between the job and its trainings and samplings: counts, and cuts off."""

    def __init__(self):
        self.fits, self.blocks = [], []  # updates each training started from; episodes per block
        self.stop_at_update = self.stop_at_block = None
        train.fit, episodes.collect = self.fit, self.collect

    def fit(self, *arguments, on_step, **options):
        def stop(step, total, metrics):
            on_step(step, total, metrics)
            if step == self.stop_at_update:
                raise KeyboardInterrupt

        result = REAL_FIT(*arguments, on_step=stop, log_every=1, **options)
        self.fits.append(result.start_step)
        return result

    def collect(self, *arguments, on_done, **options):
        def stop(episode):
            if len(self.blocks) == self.stop_at_block:
                raise KeyboardInterrupt
            on_done(episode)

        result = sampling.collect(*arguments, on_done=stop, **options)
        self.blocks.append(result.episodes)
        return result


def run(title, workdir=WORKDIR, **stop):
    watch = Watch()
    vars(watch).update(stop)
    c = tiny()
    with c.unlocked():
        if workdir != WORKDIR:
            c.cache_dir = os.fspath(workdir / "cache")
    try:
        pipeline.run(c, workdir)
    except KeyboardInterrupt:
        title += ", cut off"
    print(f"{title}: trained from {watch.fits}, sampled {watch.blocks}")


def main(directory):
    bucket.open_bucket()
    report.CONSOLE.quiet = True
    os.environ.pop("W2SJAX_CACHE", None)
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(directory / "home")
    run("first", stop_at_update=7)
    run("second", stop_at_block=1)
    print("rollouts:", *[path.name for path in files_below(WORKDIR / "rollouts")])
    run("third")
    run("fourth")
    copy = directory / "copy"
    for path in files_below(WORKDIR):
        local = copy / path.relative_to(WORKDIR)
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(path.read_bytes())
    run("copied", copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
