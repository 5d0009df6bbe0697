"""The sentences of the command line: what happened, to which file, and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

INTERRUPTED = (
    'Interrupted: all processes were stopped. Finished sessions are kept; run the same command '
    'again to continue.'
)
NOTHING_TO_DO = 'Every session already has its outputs. Add --overwrite to compute them again.'
NO_IMAGE = 'no usable image'
NO_ANATOMICAL = 'It has no images in an anat folder.'
SKIPPED = 'done before'
TO_DO = 'to do'
DONE = 'done'
FAILED = 'failed'
NO_RESULTS_YET = 'It has no results yet. Run without --reports-only.'
NOT_RUN = 'It did not run: the run ended before its turn.'
NO_REASON = 'Its outputs are incomplete and no crash was recorded; add -v to see the log.'

SHARE_NOTE = 'Each task takes its own share of the sessions, the same one on every node.'
SBATCH_NOTE = 'submit this script with sbatch'

NO_RESOURCE_RECORD = 'Nipype recorded no use of resources: it does so only when no step fails.'


def nearest(word: str, candidates: Iterable[str], /) -> str:
    """' Did you mean X?' when a candidate resembles `word`, else nothing."""
    matches = get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f' Did you mean {matches[0]}?' if matches else ''


def unknown_option(option: str, known: Iterable[str], /, *, program: str = 'babyseg') -> str:
    """An option that does not exist."""
    return f'There is no option {option}.{nearest(option, known)} See {program} -h.'


def unknown_key(path: Path, key: str, candidates: Iterable[str], /) -> str:
    """A key of a settings file that is not an option."""
    hint = nearest(key, candidates) or ' Keys are the names of options, such as participant-label.'
    return f'The settings file {path} has an unknown key {key!r}.{hint}'


def bad_config(path: Path, reason: str, /) -> str:
    """A settings file that cannot be used."""
    return f'The settings file {path} cannot be used: {reason}'


def bids_dir_missing(path: Path, /) -> str:
    """The dataset is not where the user says."""
    return (
        f'The dataset folder {path} does not exist. Check the path; inside a container, check '
        'that the folder is mounted.'
    )


def bids_dir_not_folder(path: Path, /) -> str:
    """A file where the dataset should be."""
    return f'{path} is a file. Give the root folder of the BIDS dataset instead.'


def bids_dir_unreadable(path: Path, reason: str, /) -> str:
    """The dataset folder cannot be listed."""
    return f'The dataset folder {path} cannot be read ({reason}). Check its permissions.'


def no_description(path: Path, /) -> str:
    """The dataset has no dataset_description.json."""
    return (
        f'{path} has no dataset_description.json, so it may not be the root of a BIDS dataset; '
        'going on with the sub-* folders in it.'
    )


def output_unwritable(path: Path, reason: str, /) -> str:
    """The output or work folder cannot be written."""
    if is_full(reason):
        return f'Cannot write to {path} ({reason}). Free space there or choose another folder.'
    return f'Cannot write to {path} ({reason}). Choose another folder or change its permissions.'


def is_full(reason: str, /) -> bool:
    """Whether the system's words say that a disk or a quota is used up."""
    return 'no space left' in reason.lower() or 'quota exceeded' in reason.lower()


def disk_full(output: Path, work: Path, /) -> str:
    """A step found no room; which file it was about to write, the system does not tell."""
    return (
        f'The disk is full (no space left on device): free space in {work} and {output}, or give '
        'another work folder with --work-dir, then run again; finished sessions are kept.'
    )


def memory_short(need_gb: float, limit_gb: float, source: str, /) -> str:
    """An allocation was refused."""
    return (
        f'Memory ran out: a session needs about {need_gb:.0f} GB and the limit is {limit_gb:.1f} '
        f'GB ({source}). Give more memory, or run fewer sessions side by side with --nprocs or '
        '--low-mem.'
    )


def record_unwritten(reason: str, /) -> str:
    """The note for the group level about sessions without results is missing."""
    return f'The group level will not know of the sessions below: {reason}'


def image_missing(path: Path, /) -> str:
    """An image is not where the user says."""
    return f'The image {path} does not exist. Check the path.'


def image_unusable(path: Path, reason: str, /) -> str:
    """An image that cannot be segmented."""
    return f'{path} cannot be used: {reason.rstrip(".")}.'


def exists(path: Path, /) -> str:
    """A result is there already."""
    return f'{path} exists already. Add --overwrite to replace it, or choose another folder.'


def output_in_input(output: Path, bids: Path, what: str, /) -> str:
    """Results would be mixed into the raw data."""
    return (
        f'The {what} folder {output} lies inside the dataset {bids}. Choose a folder outside it, '
        f'or {bids / "derivatives" / "babyseg"}.'
    )


def output_is_dataset(path: Path, what: str, /) -> str:
    """Another dataset is in the output folder."""
    return (
        f'The output folder {path} holds {what}. Choose a folder of its own for the results of '
        'babyseg.'
    )


def results_missing(path: Path, /) -> str:
    """The group level has no folder to read."""
    return (
        f'The folder of results {path} does not exist. Give the output folder of the participant '
        'level.'
    )


def results_unreadable(path: Path, reason: str, /) -> str:
    """Results that a report cannot be made of."""
    return f'The results beside {path} are incomplete ({reason}). Run again with --overwrite.'


def no_results(path: Path, /) -> str:
    """The group level finds no finished session."""
    return f'{path} holds no finished session of babyseg. Run the participant level first.'


def all_empty(count: int, example: str, /) -> str:
    """Sessions exist, but none has an image that can be used."""
    if count == 1:
        return f'The session has no usable image. {example}'
    return f'None of the {count} sessions has a usable image. The first: {example}'


def file_missing(option: str, path: Path, /) -> str:
    """A file named by an option does not exist."""
    return f'{option}: the file {path} does not exist. Check the path.'


def bad_array_task(text: str, /) -> str:
    """A task of a job array that cannot be read."""
    return f'--array-task: {text!r} is not of the form i/n, such as 2/8, nor auto.'


def no_such_task(text: str, count: int, /) -> str:
    """A task whose number is not among the tasks."""
    tasks = 'its tasks are numbered from 1' if not count else f'its tasks are 1 to {count}'
    return f'--array-task: there is no task {text}: {tasks}.'


def no_slurm_array(variable: str, /) -> str:
    """`auto` outside of a Slurm array."""
    return (
        f'--array-task auto: {variable} is not set, so this is no task of a Slurm array. Give '
        '--array-task i/n, such as 2/8.'
    )


def slurm_array_has_gaps(count: int, /) -> str:
    """`auto` in an array whose numbers are not evenly spaced."""
    return (
        f'--array-task auto: the numbers of this Slurm array are not evenly spaced, so that its '
        f'{count} tasks cannot be counted. Give --array-task "$SLURM_ARRAY_TASK_ID/n", where n is '
        'the number of all tasks.'
    )


def task_of_group(option: str, /) -> str:
    """An option of the participant level at the group level."""
    return f'{option} is for the participant level; the group level runs once, after all tasks.'


def only_with(option: str, other: str, /) -> str:
    """An option that means nothing alone."""
    return f'{option} means something only together with {other}.'


def not_together(option: str, other: str, /) -> str:
    """Two options that exclude each other."""
    return f'{option} and {other} cannot be given together: the job array has tasks of its own.'


def nothing_to_submit(path: Path, /) -> str:
    """No session for a job."""
    return (
        f'There is nothing to submit: no anat folder was found in {path} for what was asked. '
        'Check the path and the labels.'
    )


def submission(sessions: int, tasks: int, cpus: int, memory: int, minutes: int, /) -> str:
    """What a job array asks for."""
    share = f'{sessions} sessions in {tasks} tasks; each task'
    if tasks == 1:
        share = f'{sessions} {"session" if sessions == 1 else "sessions"} in one task; it'
    processors = 'processor' if cpus == 1 else 'processors'
    return f'{share} asks for {cpus} {processors}, {memory} MB of memory and {minutes} minutes.'


def how_to_submit(folder: Path, /) -> str:
    """What is left to do after the scripts were written."""
    return f'The scripts are in {folder}. Look at them, then run:'


def no_sbatch(folder: Path, /) -> str:
    """--now where there is no Slurm."""
    return (
        f'--now: there is no sbatch on this machine. The scripts are in {folder}; submit them '
        'from a login node of the cluster.'
    )


def sbatch_failed(script: Path, reason: str, before: str = '', /) -> str:
    """Slurm refused a script."""
    kept = f' Job {before} was submitted and runs.' if before else ''
    return f'sbatch did not take {script}: {reason.rstrip(".")}.{kept}'


def submitted(array: str, group: str, /) -> str:
    """Jobs that were handed over."""
    return f'Submitted job array {array}, and job {group} for the group level, which waits for it.'


def array_script_notes(version: str, sessions: int, tasks: int, script: str, group: str, /) -> str:
    """What the script of a job array says at its top."""
    return f"""\
Written by babyseg {version} for {sessions} sessions, in {tasks} tasks.

  jobid=$(sbatch --parsable {script})
  sbatch --dependency=afterany:$jobid {group}

Options given to sbatch win over the lines below: sbatch --time=4:00:00 ...
A task that runs again does only what is missing. Only tasks 3 and 7: sbatch --array=3,7 ...
At most 50 tasks at a time: sbatch --array=1-{tasks}%50 ...

The dataset must not gain or lose subjects while the tasks run: their shares follow from it."""


def group_script_notes(version: str, /) -> str:
    """What the script of the group level says at its top."""
    return f"""\
Written by babyseg {version}: tables and a page of all sessions.
It runs after the array, also when some of its tasks failed (afterany): one bad session must not
keep back the results of all others."""


def empty_share(task: object, /) -> str:
    """A task of an array that has no session."""
    return f'Task {task} has no sessions: there are fewer subjects than tasks.'


def filter_unusable(path: str, reason: str, /) -> str:
    """A filter file that is not a JSON object."""
    return f'--bids-filter-file: {path} is not a JSON object of filters ({reason}).'


def plugin_unusable(path: Path, reason: str, /) -> str:
    """A Nipype plugin file that cannot be used."""
    return (
        f'--use-plugin: {path} cannot be used ({reason}). It must be YAML or JSON with the keys '
        'plugin and, optionally, plugin_args.'
    )


def space_unknown(text: str, known: Iterable[str], /) -> str:
    """A word after --output-spaces that means nothing."""
    return (
        f'--output-spaces: {text!r} is not known; give {", ".join(known)}, and :cohort-auto or '
        ':cohort-N behind a template that has cohorts.'
    )


def cohort_unknown(text: str, template: str, known: int, /) -> str:
    """A cohort that a template does not have."""
    has = f'has the cohorts 1 to {known}' if known else 'has no cohorts'
    return f'--output-spaces: {template} {has}, so {text!r} does not exist.'


def cohort_without_age(text: str, template: str, /) -> str:
    """The cohort was to follow from an age that is not known."""
    return (
        f'{text} was not written: its cohort follows from the age, which is not known; give it '
        f'with --age-months, or name a cohort ({template}:cohort-N).'
    )


def cohort_too_far(text: str, template: str, months: float, /) -> str:
    """No cohort is near the age of the child."""
    return (
        f'{text} was not written: {template} has no cohort near the age of {months:.1f} months; '
        f'name one ({template}:cohort-N), or ask for another template.'
    )


def cohort_nearest(space: str, months: float, /) -> str:
    """The child is younger or older than those of the nearest cohort."""
    return (
        f'{space} is the cohort nearest to {months:.1f} months, although it was made from '
        'children of other ages; look at the result.'
    )


def template_missing(space: str, folder: Path, reason: str, /) -> str:
    """A template is neither on this machine nor to be had."""
    return (
        f'{space} was not written: its template is not in {folder} and could not be fetched '
        f'({reason}); fetch it where there is internet, set TEMPLATEFLOW_HOME to its folder, and '
        'run again.'
    )


def normalisation_poor(space: str, overlap: float, least: float, /) -> str:
    """The labels lie badly on those of the template."""
    return (
        f'The labels in {space} overlap with those of the template by {overlap:.2f} only (Dice, '
        f'at least {least:.2f} is expected); look at them before use.'
    )


def normalisation_empty(space: str, /) -> str:
    """There are too few labels to register with."""
    return (
        f'{space} was not written: the scan or the template has too few structures to align '
        'them; look at the label map.'
    )


def foreign_work_dir(path: Path, /) -> str:
    """--clean-workdir would delete files of someone else."""
    return (
        f'--clean-workdir: {path} holds files and was not made by babyseg, so nothing was '
        'deleted. Give an empty or a new folder with --work-dir.'
    )


def resources(cpus: int, mem_gb: float, cpu_source: str, mem_source: str, /) -> str:
    """What babyseg understood of processors and memory."""
    processors = 'processor' if cpus == 1 else 'processors'
    return (
        f'Using {cpus} {processors} ({cpu_source}) and {mem_gb:.1f} GB of memory ({mem_source}).'
    )


def shares(at_once: int, threads: int, /) -> str:
    """How the sessions share the machine."""
    sessions = 'One session at a time' if at_once == 1 else f'{at_once} sessions at a time'
    return f'{sessions}, with {threads} {"thread" if threads == 1 else "threads"} each.'


def little_memory(session: str, mem_gb: float, need_gb: float, /) -> str:
    """Less memory than the largest session needs."""
    return (
        f'{session} needs about {need_gb:.0f} GB of memory and {mem_gb:.1f} GB may be used: the '
        'system may end a process. Give more memory, or see --low-mem.'
    )


def memory_kill(need_gb: float, limit_gb: float, source: str, /) -> str:
    """A worker was killed from outside."""
    return (
        f'The system killed the process, most likely because memory ran out: a session needs '
        f'about {need_gb:.0f} GB and the limit is {limit_gb:.1f} GB ({source}). Give more memory, '
        'or run fewer sessions side by side with --nprocs or --low-mem.'
    )


def worker_died(exit_code: int, /) -> str:
    """A worker ended by itself without a Python exception."""
    cause = f'signal {-exit_code}' if exit_code < 0 else f'exit code {exit_code}'
    return (
        f'The process ended without an error message ({cause}). Run again with -vv; if it '
        'happens again, please report it with the log.'
    )


def plan_counts(counts: Iterable[tuple[str, int]], /) -> str:
    """How many sessions share each fate."""
    return f'Sessions: {", ".join(f"{number} {fate}" for fate, number in counts)}.'


def estimate(
    sessions: int,
    at_once: int,
    time: tuple[str, str, int],
    memory_gb: float,
    disk_mb: float,
    /,
    *,
    more: bool,
) -> str:
    """What the sessions to do would take; `time` is that of all, of one, and where it is from."""
    whole, one, known = time
    source = 'as measured on 2 processors'
    if known:
        source = f'the network alone, as in {known} finished here'
    disk = f'{disk_mb:.0f} MB' if disk_mb < 1000 else f'{disk_mb / 1000:.1f} GB'
    probabilities = ', and more for the probabilities' if more else ''
    return (
        f'Estimate for {sessions} to do, {at_once} at a time: {whole} ({one} each, {source}), '
        f'{memory_gb:.0f} GB of memory, {disk} for results{probabilities} and as much for '
        'intermediate files.'
    )


def boilerplate(path: Path, /) -> str:
    """Where the methods text is."""
    return f'Methods text: {path}; references: {path.with_suffix(".bib")}'


def unexpected(error: BaseException, crash_file: Path | None, /) -> str:
    """A bug."""
    what = f'{type(error).__name__}: {first_line(str(error))}'.rstrip(': ')
    where = f'The details are in {crash_file}; please' if crash_file else 'Please'
    return f'Something unexpected went wrong ({what}). {where} report it.'


def missing(arguments: str, usage: str, /) -> str:
    """Arguments that are required."""
    return f'Missing: {arguments}. {usage}'


def summary(done: str, skipped: int, empty: int, failed: int, output: Path, /) -> str:
    """The last sentence of a run."""
    parts = [done]
    if skipped:
        parts.append(f'{skipped} done before')
    if empty:
        parts.append(f'{empty} without a usable image')
    if failed:
        parts.append(f'{failed} failed')
    return f'Sessions: {", ".join(parts)}. Results: {output}'


def first_line(text: str, /) -> str:
    """First line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), '')
