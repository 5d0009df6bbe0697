"""Fills the documentation with what the code itself says; mkdocs calls `on_page_markdown`.

A page asks for a table by a line such as `<!-- options: babyseg -->`; `MAKERS` names them all.
"""

import argparse
import ast
import re
import runpy
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = ('babyseg_bids', 'workflows', 'synthesis')
MARKER = re.compile(r'^<!-- ([a-z]+)(?:: ([\w./-]+))? -->$', re.MULTILINE)
# What stands in a sentence for a value that is known only when it is said.
VALUE = '…'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker of a page by its table."""
    return MARKER.sub(lambda m: MAKERS[m[1]](*filter(None, [m[2]])), markdown)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; what is not marked as code by the caller is shown as it is."""
    cells = [head, ['---'] * len(head), *([c.replace('|', '\\|') for c in row] for row in rows)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def plain(text: str) -> str:
    """Text without characters that Markdown or HTML would take for its own."""
    return re.sub(r'([*_<`\[])', r'\\\1', text)


# Options of the programs.


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each program that has one."""
    from babyseg_bids.cli import parser, segment
    from babyseg_bids.synthesis import cli, example, train_cli

    makers = (parser, segment, train_cli, cli, example)
    found = (module.build_parser() for module in makers)
    return {p.prog: p for p in found}


def options(program: str) -> str:
    """Tables of a program's options, one a group or sub-command."""
    return '\n\n'.join(_options_of(parsers()[program], level=3))


def _options_of(parser: argparse.ArgumentParser, *, level: int) -> Iterator[str]:
    # What has no group of its own is one table: positions first.
    first, second, *named = parser._action_groups
    groups = [('option', [*first._group_actions, *second._group_actions])]
    groups += [(group.title or '', group._group_actions) for group in named]
    for title, actions in groups:
        commands = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
        rows = [
            [_spelling(a), plain((a.help or '') % _defaults(a, parser))]
            for a in actions
            if a not in commands and not {'--help', '--version'} & set(a.option_strings)
        ]
        if rows:
            yield table([title, ''], rows)
        for action in commands:
            about = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield f'{"#" * level} {command.prog}\n\n{_sentence(plain(about[name] or ""))}'
                yield from _options_of(command, level=level + 1)


def _sentence(text: str) -> str:
    return f'{text[:1].upper()}{text[1:].rstrip(".")}.'


def _defaults(action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What `%(default)s` and `%(prog)s` stand for in a help text."""
    return {**vars(action), 'prog': parser.prog}


def _spelling(action: argparse.Action) -> str:
    """`--mem SIZE`, then its other spellings."""
    value = ''
    if action.nargs != 0:
        name = action.metavar or action.dest.upper()
        value = str(name if action.option_strings else action.metavar or action.dest)
        if action.choices and not action.metavar:
            value = '|'.join(map(str, action.choices))
        value += ' …' if action.nargs == '+' or isinstance(action, argparse._AppendAction) else ''
    if not action.option_strings:
        return f'`{value}`'
    names = sorted(action.option_strings, key=lambda o: not o.startswith('--'))
    return ', '.join([f'`{names[0]} {value}`'.replace(' `', '`'), *(f'`{n}`' for n in names[1:])])


def wrapper() -> str:
    """What the wrapper, which has no parser, says of its own options."""
    from babyseg_bids import wrapper as module

    return f'```\n{(module.__doc__ or "").partition(chr(10) * 2)[2].strip()}\n```'


# Tables that the code has.


def labels() -> str:
    """The label table; those of the official network are left out."""
    from babyseg_bids.labels import label_table

    sides = {'L': 'left', 'R': 'right'}
    rows = [
        [
            str(r.index),
            r.name,
            r.abbreviation,
            sides.get(r.hemisphere, r.hemisphere),
            r.tissue,
            f'<span style="background:{r.color}">&emsp;</span> `{r.color}`',
        ]
        for r in label_table().structures
    ]
    return table(['index', 'name', 'abbreviation', 'hemisphere', 'tissue', 'colour'], rows)


def descriptions() -> str:
    """What `desc-` means in the names of the derivatives."""
    from babyseg_bids.outputs import DESCRIPTIONS

    return table(
        ['in names', 'content'], [[f'`desc-{k}`', plain(v)] for k, v in DESCRIPTIONS.items()]
    )


def limits() -> str:
    """Measures of quality, and beyond which value each raises its flag."""
    from babyseg_bids.qc_flags import LIMITS, PLAUSIBLE_VOLUME

    rows = []
    for measure, limit in LIMITS.items():
        sign = 'below' if limit.below else 'above'
        severe = '' if limit.severe is None else f'{sign} {limit.severe:g}'
        expected = limit.expected_months
        remark = f'{expected[0]:g} to {expected[1]:g} months' if expected else ''
        rows.append(
            [f'`{measure}`', f'`{limit.code}`', f'{sign} {limit.warning:g}', severe, remark]
        )
    head = ['measure', 'flag', 'warning', 'severe', 'only a remark at']
    known = PLAUSIBLE_VOLUME
    bounds = [
        [f'{value:g}' for value in row]
        for row in zip(known.months, known.low, known.high, strict=True)
    ]
    bounds.append(['unknown', *(f'{value:g}' for value in known.any_age)])
    ages = table(['age (months)', 'at least (mL)', 'at most (mL)'], bounds)
    return (
        f'{table(head, rows)}\n\n`implausible-volume` is raised outside these brain volumes, '
        f'interpolated between the ages:\n\n{ages}'
    )


def presets() -> str:
    """The settings of the synthesis that come with babyseg, by their own first line."""
    folder = ROOT / 'babyseg_bids/data/synthesis'
    rows = [
        [f'`{path.stem}`', path.read_text('utf-8').partition('\n')[0].lstrip('# ')]
        for path in sorted(folder.glob('*.toml'))
    ]
    return table(['preset', 'for'], rows)


def changes() -> str:
    """The change log without its title."""
    return (ROOT / 'CHANGES.md').read_text('utf-8').partition('\n')[2].strip()


def api(name: str) -> str:
    """Signature and docstring of an object, such as `babyseg_bids.pipeline/Result`.

    Read from the source: importing it would import torch.
    """
    module, _, path = name.partition('/')
    spec = find_spec(module)
    nodes: list[Any] = [ast.parse(Path(spec.origin).read_text('utf-8'))]
    for part in path.split('.'):
        nodes.append(next(n for n in nodes[-1].body if getattr(n, 'name', '') == part))
    node = nodes[-1]
    shown = node
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if getattr(n, 'name', '') == '__init__']
        shown = inits[0] if inits else None
    signature = f'class {path}'
    if shown is not None:
        arguments = [a for a in _arguments(shown.args) if a != 'self']
        returned = f' -> {ast.unparse(shown.returns)}' if shown is node and node.returns else ''
        signature = f'{path}({", ".join(arguments)}){returned}'
        if len(signature) > 80:
            inside = ''.join(f'    {a},\n' for a in arguments)
            signature = f'{path}(\n{inside}){returned}'
    text = ast.get_docstring(node) or ''
    return f'```python\n{signature}\n```\n\n```text\n{text}\n```'


def _arguments(args: ast.arguments) -> list[str]:
    """Each argument as it is written, with `/` and `*` in their places."""
    named = [*args.posonlyargs, *args.args]
    gap = len(named) - len(args.defaults)
    found = []
    for i, arg in enumerate(named):
        found.append(_argument(arg, args.defaults[i - gap] if i >= gap else None))
        if args.posonlyargs and i + 1 == len(args.posonlyargs):
            found.append('/')
    found += ['*'] if args.kwonlyargs else []
    return found + [
        _argument(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f' = {ast.unparse(default)}' if default else '')


# Sentences that the code says.


def sentences(node: ast.AST, values: dict[str, ast.expr] | None = None) -> str:
    """The text of an expression, with `VALUE` for what is not known before it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return ''.join(sentences(part, values) for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return sentences(left, values) + sentences(right, values)
        case ast.Name(id=name) if values and name in values:
            return sentences(values[name], {k: v for k, v in values.items() if k != name})
    return VALUE


@cache
def modules() -> list[ast.Module]:
    """The source files of the package, parsed."""
    paths = [p for folder in SOURCES for p in sorted((ROOT / folder).rglob('*.py'))]
    return [ast.parse(path.read_text('utf-8')) for path in paths]


def spoken() -> set[str]:
    """Every piece of text in the code, as it would be said."""
    found = set()
    for tree in modules():
        inner = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr | ast.BinOp)
            for part in ast.walk(node)
            if part is not node
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
                and id(node) not in inner
            ):
                found.add(sentences(node))
    return found - {VALUE, ''}


def _flag_calls() -> Iterator[tuple[str, str, str]]:
    """Code, severities and sentence of each flag that is raised with a code of its own."""
    for tree in modules():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            values: dict[str, ast.expr] = {}
            kinds = ast.Assign | ast.AugAssign | ast.Call
            nodes = [n for n in ast.walk(function) if isinstance(n, kinds)]
            for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    values[node.targets[0].id] = node.value
                elif node in function.body and isinstance(node, ast.AugAssign):
                    name = ast.unparse(node.target)
                    start = values.get(name, ast.Constant(''))
                    values[name] = ast.BinOp(start, node.op, node.value)
                elif (
                    isinstance(node, ast.Call)
                    and getattr(node.func, 'id', '') == 'Flag'
                    and len(node.args) == 3
                    and isinstance(node.args[0], ast.Constant)
                ):
                    code, severity, text = node.args
                    said = {
                        n.value
                        for n in ast.walk(severity)
                        if isinstance(n, ast.Constant) and isinstance(n.value, str)
                    }
                    chosen = values.get(text.id, text) if isinstance(text, ast.Name) else text
                    both = isinstance(chosen, ast.IfExp)
                    for choice in (chosen.body, chosen.orelse) if both else (text,):
                        yield str(code.value), ' or '.join(sorted(said)), sentences(choice, values)


def flags() -> str:
    """All flags: from measures of quality, and from files, headers and metadata."""
    from babyseg_bids.qc_flags import LIMITS, SENTENCES

    found: dict[str, tuple[set[str], list[str]]] = {}
    said = [(LIMITS[k].code, '', re.sub(r'\{[^}]*\}', VALUE, v)) for k, v in SENTENCES.items()]
    for code, severity, text in [*_flag_calls(), *said]:
        severities, texts = found.setdefault(code, (set(), []))
        severities |= {s for s in severity.split(' or ') if s in ('info', 'warning', 'severe')}
        if text != VALUE and text not in texts:
            texts.append(text)
    for limit in LIMITS.values():
        severities = found.setdefault(limit.code, (set(), []))[0]
        severities |= {'warning'} | ({'severe'} if limit.severe is not None else set())
        severities |= {'info'} if limit.expected_months else set()
    order = ('info', 'warning', 'severe')
    rows = [
        [
            f'`{code}`',
            ', '.join(s for s in order if s in severities),
            '<br>'.join(plain(t) for t in texts),
        ]
        for code, (severities, texts) in sorted(found.items())
    ]
    return table(['flag', 'severity', f'what it says ({VALUE} is a value)'], rows)


def licences() -> str:
    """What a run-time installation holds, and under which licence each part says it is."""
    bill = runpy.run_path(str(ROOT / 'requirements/sbom.py'))
    locked = bill['pins'](ROOT / 'requirements/lock.txt')
    rows = [[n, v, bill['licence'](n) or 'says nothing'] for n, v in locked.items()]
    return table(['package', 'version', 'licence'], rows)


def included(path: str) -> str:
    """A Markdown file of the source tree without its title, one heading level lower."""
    text = (ROOT / path).read_text('utf-8').partition('\n')[2].strip()
    return re.sub(r'^(#+ )', r'#\1', text, flags=re.MULTILINE)


MAKERS: dict[str, Callable[..., str]] = {
    f.__name__: f
    for f in (
        options,
        wrapper,
        labels,
        descriptions,
        limits,
        presets,
        changes,
        api,
        flags,
        licences,
        included,
    )
}
