"""The loop of continual learning: for each task and each batch train, look where the schedules say so, and commit."""

import torch

from ntkgen.continual.batches import blended, cut, remaining_batches
from ntkgen.continual.chance import seed_of
from ntkgen.continual.checkpoint import read_checkpoint
from ntkgen.continual.optimizer import set_learning_rate
from ntkgen.continual.plan import Plan
from ntkgen.continual.record import CHECKPOINT
from ntkgen.continual.run import Announce, Run, say_nothing
from ntkgen.continual.schedule import Moment
from ntkgen.continual.streams.tasks import Task
from ntkgen.files.folder import Folder
from ntkgen.files.lock import write_lock
from ntkgen.progress import Report, ignore_report
from ntkgen.training.loop import training_mode


def learn(
    plan: Plan,
    folder: Folder,
    device: torch.device,
    report: Report = ignore_report,
    announce: Announce = say_nothing,
) -> Run:
    """Train a network on all tasks, from the beginning or from the newest checkpoint.

    Everything is recorded below the folder. A run that was killed ends with the same bytes on a CPU.

    Args:
        plan: What the run will do.
        folder: The folder of the run.
        device: The device of the network.
        report: Gets the progress.
        announce: Gets a line for every epoch, every evaluation and every window of iterations.

    Raises:
        FingerprintError: If there is a run with other settings or other data.
        StoreLockedError: If another process writes the run.
        DivergedError: If a loss is not finite.
    """
    folder.require_writable()
    with write_lock(folder):
        data = folder.read(CHECKPOINT)
        checkpoint = None if data is None else read_checkpoint(data, str(folder))
        # The last bits of products depend on the number of threads: a run keeps the one that it has begun with.
        threads = torch.get_num_threads() if checkpoint is None else int(checkpoint["threads"])
        with training_mode(device, seed_of(plan.settings.seed, "noise"), threads):
            run = Run(plan, folder, device, announce)
            run.resume(checkpoint)
            del data, checkpoint  # the run has copied them
            for task in plan.stream.tasks[run.task :]:
                learn_task(run, task, report)
            run.record.finish()
            run.snapshots.series.sync()
    return run


def learn_task(run: Run, task: Task, report: Report = ignore_report) -> None:
    """Train on one task from where the run is."""
    settings, first = run.plan.settings, run.method.epoch_ids(task, 0)
    steps_per_epoch = len(cut(first, settings))
    num_steps = steps_per_epoch * settings.epochs
    total = run.iteration - run.step + num_steps + sum(run.planned[task.number + 1 :])  # of the whole run
    if not run.has_begun:
        run.begin(task)
        if task.number == 0:  # the end of each task is the beginning of the next
            run.write_parameters("start")
            run.look(Moment(0, 0, steps_per_epoch, num_steps))
    run.watch.begin_epoch()
    for ids in remaining_batches(run.method, task, settings, run.step):
        set_learning_rate(run.optimizer, settings.step_size_at(run.step // steps_per_epoch))
        frozen = settings.freeze_batch_norm and run.step >= steps_per_epoch
        mixed = blended(ids, run.plan.stream, task, run.step, settings.seed)
        run.train_on(run.method.batch_ids(mixed, task, run.step), frozen=frozen)
        run.step, run.iteration = run.step + 1, run.iteration + 1
        run.epochs_done = task.number * settings.epochs + run.step / steps_per_epoch
        moment = Moment(task.number, run.step, steps_per_epoch, num_steps)
        if moment.ends_epoch:
            run.end_epoch(moment)
        if moment.ends_task:
            run.end(task)
        run.look(moment)
        if moment.ends_task:  # before the commit: the end of a task may change what `epoch_ids` lists
            run.task, run.step, run.has_begun = task.number + 1, 0, False
        if moment.ends_epoch or run.is_due:
            run.commit()
        if moment.ends_epoch:
            run.watch.begin_epoch()
        report("training", run.iteration, total, run.note(moment))
