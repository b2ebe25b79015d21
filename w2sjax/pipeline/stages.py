"""Running the stages of one job: which settings each depends on, where it lies, what is done."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from w2sjax import report
from w2sjax.pipeline.manifests import Finish, Make, Stage, run_stage, stage_key
from w2sjax.pipeline.processes import Processes
from w2sjax.train.termination import raise_lost_interrupt


class Stages:
    """The stages of one run, as far as they are done.

    Args:
      settings: the config as JSON values.
      workdir: where stages lie.
      cache: where those lie that other runs share.
      mesh: what models run on; part of every stage's key.
      processes: those of the job.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        workdir: epath.Path,
        cache: epath.Path,
        mesh: Mesh,
        processes: Processes,
    ):
        self.done: list[Stage] = []
        self._settings, self._workdir, self._cache = settings, workdir, cache
        self._processes = processes
        self._runtime = {"backend": jax.default_backend(), "mesh": dict(mesh.shape)}

    def run(
        self,
        name: str,
        fields: tuple[str, ...],
        inputs: Mapping[str, Stage],
        make: Make,
        *,
        facts: Mapping[str, Any] | None = None,
        shared: bool = False,
        finish: Finish | None = None,
        together: bool = False,
    ) -> Stage:
        """Runs one stage, or finds it done.

        Args:
          name: its directory, relative to the workdir.
          fields: what of the config it depends on, with dots.
          inputs: the stages that it reads.
          make: makes it.
          facts: what it depends on beside.
          shared: it lies in the cache, under its key, for other runs too.
          finish: completes it where all processes made their share; see `run_stage`.
          together: of several processes, all make it rather than the first one alone.

        Returns:
          The finished stage.

        Raises:
          ValueError: its directory was made with other settings or inputs, or was changed.
          KeyboardInterrupt: Ctrl-C, one too that got lost inside the stage.
        """
        for stage in self.done:
            if stage.name == name:
                return stage
        chosen = {"runtime": self._runtime} | dict(facts or {})
        for field in fields:
            chosen[field] = functools.reduce(dict.__getitem__, field.split("."), self._settings)
        directory = self._workdir / name
        if shared:
            directory = self._cache / f"{name}-{stage_key(name, chosen, inputs)}"
        stage = run_stage(
            name,
            directory,
            chosen,
            inputs,
            make,
            finish=finish,
            together=together,
            processes=self._processes,
        )
        state = "already there" if stage.skipped else f"{stage.seconds:.1f} s"
        report.CONSOLE.print(f"{name:<32} {state}", markup=False, highlight=False)
        self.done.append(stage)
        raise_lost_interrupt()
        return stage
