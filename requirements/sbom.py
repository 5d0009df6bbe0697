"""Print the software bill of materials of a lock file (CycloneDX 1.6, JSON).

    python requirements/sbom.py requirements/lock.txt > sbom.cdx.json

Names and versions come from the lock file, licences and dependencies from the packages that are
installed. What the viewer of the reports is bundled from is listed as well: no lock file names it,
but babyseg ships it. There is no date and no random number: the same lock gives the same bytes.
"""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Classifiers that name a family of licences only.
VAGUE = ('OSI Approved', 'Other/Proprietary License')
# Written with the bundle, by build.sh beside it: a heading a package.
VIEWER = Path(__file__).parent.parent / 'babyseg_bids' / 'data' / 'viewer' / 'LICENSES.txt'


def pins(lock: Path) -> dict[str, str]:
    """Versions by name in a lock file."""
    lines = [x for x in lock.read_text('utf-8').splitlines() if x and not x.startswith('#')]
    return dict(line.split('==') for line in lines)


def licence(name: str) -> str:
    """What an installed package says of its licence: an expression, a classifier or a short text.

    '' when it says nothing, or is not installed.
    """
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return ''
    classified = [
        c.rpartition(' :: ')[2]
        for c in about.get_all('Classifier') or ()
        if c.startswith('License ::')
    ]
    stated = about.get('License-Expression') or ''
    named = ', '.join(c for c in classified if c not in VAGUE)
    text = about.get('License') or ''
    return stated or named or (text if len(text) < 60 and '\n' not in text else '')


def viewer(licences: Path) -> list[dict[str, Any]]:
    """The npm packages whose code is in the viewer of the reports."""
    found = re.findall(r'^== (\S+) (\S+)$', licences.read_text('utf-8'), re.MULTILINE)
    components = []
    for name, pinned in found:
        purl = f'pkg:npm/{name.replace("@", "%40")}@{pinned}'
        components.append(
            {'type': 'library', 'bom-ref': purl, 'name': name, 'version': pinned, 'purl': purl}
        )
    return components


def bill(lock: Path) -> dict[str, Any]:
    """The bill of materials of babyseg with what a lock file pins."""
    locked = pins(lock)
    purls = {
        canonicalize_name(n): f'pkg:pypi/{canonicalize_name(n)}@{v}' for n, v in locked.items()
    }
    own = f'pkg:pypi/babyseg@{version("babyseg")}'
    components: list[dict[str, Any]] = []
    for name, pinned in locked.items():
        component = {
            'type': 'library',
            'bom-ref': purls[canonicalize_name(name)],
            'name': name,
            'version': pinned,
            'purl': purls[canonicalize_name(name)],
        }
        said = licence(name)
        if said:
            component['licenses'] = [{'license': {'name': said}}]
        components.append(component)
    bundled = viewer(VIEWER)
    needs = {ref: _needs(name, purls) for name, ref in [('babyseg', own), *purls.items()]}
    # Which of them needs which is lost in the bundle.
    needs[own] += [component['bom-ref'] for component in bundled]
    return {
        'bomFormat': 'CycloneDX',
        'specVersion': '1.6',
        'version': 1,
        'metadata': {
            'component': {
                'type': 'application',
                'bom-ref': own,
                'name': 'babyseg',
                'version': version('babyseg'),
                'purl': own,
                'licenses': [{'expression': 'Apache-2.0'}],
            }
        },
        'components': components + bundled,
        'dependencies': [{'ref': ref, 'dependsOn': refs} for ref, refs in needs.items()],
    }


def _needs(name: str, purls: dict[str, str]) -> list[str]:
    """What a package needs of the lock, without its extras."""
    try:
        asked = requires(name) or ()
    except PackageNotFoundError:
        return []
    found = [Requirement(re.sub(r'\s+', ' ', text)) for text in asked]
    names = {
        canonicalize_name(r.name)
        for r in found
        if r.marker is None or r.marker.evaluate({'extra': ''})
    }
    return sorted(purls[n] for n in names & set(purls))


if __name__ == '__main__':
    print(json.dumps(bill(Path(sys.argv[1])), indent=1))
