"""The program `babyseg`: one command line, one exit code.

Only the standard library is imported here: `babyseg -h`, `--version` and errors in the command
line must not wait for numpy, PyBIDS or torch.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from babyseg_bids import messages
from babyseg_bids.cli.parser import parse_command
from babyseg_bids.cli.submission import Submission
from babyseg_bids.errors import BabySegError
from babyseg_bids.settings import Settings

FAILURE = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run babyseg; the exit code.

    0: every requested session has its outputs. 1: some failed. 2: wrong usage or an unwritable
    folder. 3: nothing in the dataset matches. 130: interrupted.
    """
    settings = None
    # A batch system that ends a job sends SIGTERM first; workers must go then, too.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        settings, job = parse_command(words)
        return _run(settings, job, words)
    except KeyboardInterrupt:
        _say(messages.INTERRUPTED)
        return INTERRUPTED
    except BabySegError as error:
        if settings and settings.verbose > 1:
            traceback.print_exc()
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of the output (`head`) is gone; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except MemoryError:
        return _report_memory()
    except Exception as error:  # noqa: BLE001 - the last place where a bug can become a sentence.
        return _report_bug(error, settings)


def _run(settings: Settings, job: Submission | None, words: Sequence[str]) -> int:
    if job is not None:
        from babyseg_bids.cli.submit import run_submit

        return run_submit(settings, job, words)
    if settings.level == 'group':
        from babyseg_bids.cli.group import run_group

        return run_group(settings)
    from babyseg_bids.cli.participant import run_participant

    return run_participant(settings)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _report_memory() -> int:
    from babyseg_bids.resources import SESSION_GB, memory_limit

    limit = memory_limit()
    _say(messages.memory_short(SESSION_GB, limit.amount, limit.source))
    return FAILURE


def _report_bug(error: Exception, settings: Settings | None) -> int:
    from babyseg_bids.cli.crashes import write_crash

    if settings and settings.verbose > 1:
        traceback.print_exc()
    _say(messages.unexpected(error, write_crash(error, settings)))
    return FAILURE


def _say(sentence: str) -> None:
    print(f'babyseg: {sentence}', file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
