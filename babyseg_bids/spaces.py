"""Standard spaces: the words for them, and which cohort of a template fits a child's age."""

import re
from dataclasses import dataclass

from babyseg_bids import messages
from babyseg_bids.records import Age

# Words for "the grid of the reference image" that users of other BIDS Apps write.
NATIVE_SPACES = ('anat', 'T1w', 'T2w', 'native')
_DAYS_A_MONTH = 365.25 / 12
_TERM_WEEKS = 40


def _postmenstrual(weeks: float) -> float:
    """Months after birth at term of an age in post-menstrual weeks."""
    return (weeks - _TERM_WEEKS) * 7 / _DAYS_A_MONTH


# From and to which age in months each cohort was made, cohort 1 first (TemplateFlow); none for a
# template that has no cohorts.
COHORTS: dict[str, tuple[tuple[float, float], ...]] = {
    'MNIInfant': (
        (0, 2),
        (2, 5),
        (5, 8),
        (8, 11),
        (11, 14),
        (14, 17),
        (17, 21),
        (21, 27),
        (27, 33),
        (33, 44),
        (44, 60),
    ),
    'UNCInfant': tuple(
        (_postmenstrual(low), _postmenstrual(high))
        for low, high in ((38.7, 46.4), (87.9, 109.1), (131.4, 163.4))
    ),
    'MNI152NLin2009cAsym': (),
}
# A child this much older or younger than a cohort is still given it, with a flag.
TOLERANCE_MONTHS = 6.0


@dataclass(frozen=True)
class Space:
    """A template, and one of its cohorts if it has some."""

    template: str
    cohort: int | None = None

    @property
    def name(self) -> str:
        """As in file names: `MNIInfant+3`."""
        return self.template if self.cohort is None else f'{self.template}+{self.cohort}'


def parse_space(text: str, /) -> tuple[str, int | None]:
    """Template and cohort of `MNIInfant:cohort-3`; the cohort is None where the age decides.

    Raises
    ------
    ValueError
        One sentence on what cannot be understood.
    """
    match = re.fullmatch(r'(\w+)(?::cohort-(auto|\d+))?', text)
    if not match or match[1] not in COHORTS:
        raise ValueError(messages.space_unknown(text, (*NATIVE_SPACES[:1], *COHORTS)))
    template, cohort = match.groups()
    known = len(COHORTS[template])
    if cohort in (None, 'auto') and (known or cohort is None):
        return template, None
    if cohort == 'auto' or not 1 <= int(cohort) <= known:
        raise ValueError(messages.cohort_unknown(text, template, known))
    return template, int(cohort)


def standard_spaces(texts: tuple[str, ...], /) -> tuple[str, ...]:
    """The texts that ask for more than the grid of the reference."""
    return tuple(t for t in texts if t not in NATIVE_SPACES)


def choose_space(text: str, age: Age, /) -> tuple[Space | None, str]:
    """The space that a text asks for, for a child of this age.

    Returns
    -------
    space : None where no cohort fits
    note : why not, or that the child is outside the cohort's ages; empty when all is well
    """
    template, cohort = parse_space(text)
    ranges = COHORTS[template]
    if not ranges or cohort is not None:
        return Space(template, cohort), ''
    months = age.months
    if months is None:
        return None, messages.cohort_without_age(text, template)
    distances = [max(low - months, months - high, 0.0) for low, high in ranges]
    best = min(range(len(ranges)), key=distances.__getitem__)
    if distances[best] > TOLERANCE_MONTHS:
        return None, messages.cohort_too_far(text, template, months)
    space = Space(template, best + 1)
    return space, messages.cohort_nearest(space.name, months) if distances[best] else ''
