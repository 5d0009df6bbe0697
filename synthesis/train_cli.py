"""`babyseg-train`: prepare label maps, train on them, and export weights."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from babyseg_bids import __version__
from babyseg_bids.errors import BabySegError, InputError, UsageError

if TYPE_CHECKING:
    from babyseg_bids.network.weights import Model
    from babyseg_bids.synthesis.evaluate import Case
    from babyseg_bids.synthesis.maps import TrainingMap

COMPASS_STAGES = ('6.0:32x32x32:800:8', '4.0:48x48x48:3500:8')
DEFAULT_STAGES = (
    '2.0:64x96x64:4000:2',
    '1.0:128x160x128:8000:2',
)
_SETTINGS = 'preset of the synthesis, or TOML file (see `babyseg-synth settings`)'


def build_parser() -> argparse.ArgumentParser:
    """The command line of `babyseg-train`."""
    parser = argparse.ArgumentParser(
        prog='babyseg-train', description='Train babyseg on synthetic images of label maps.'
    )
    parser.add_argument('--version', action='version', version=f'babyseg {__version__}')
    commands = parser.add_subparsers(dest='command', required=True)

    prepare = commands.add_parser(
        'prepare', help='read and clean label maps into the one file that training reads'
    )
    prepare.add_argument('label_maps', nargs='+', type=Path, help='1 mm label maps (NIfTI)')
    prepare.add_argument('--out', type=Path, required=True, help='file to write (.npz)')
    prepare.add_argument(
        '--no-morphing',
        action='store_true',
        help='do not estimate how the brains turn into each other (saves some minutes)',
    )
    prepare.add_argument(
        '--grow-white-matter',
        action='store_true',
        help='where a name says the age, let white matter reach further into the cortex until '
        'its share of both is the published one; for maps that draw it too thin',
    )
    prepare.add_argument('--threads', type=int, default=2, help='default: 2')

    complete = commands.add_parser(
        'complete',
        help='make whole label maps of maps that only know tissues, such as fetal atlases',
    )
    complete.add_argument(
        'tissue_maps',
        nargs='+',
        type=Path,
        help='NIfTI, numbered 1 white matter, 2 ventricles, 3 cerebellum, 4 fluid around the '
        'brain, 5 cortex, 6 deep grey matter, 7 brainstem, 8 corpus callosum',
    )
    complete.add_argument('--out', type=Path, required=True, help='folder to write into')
    complete.add_argument('--model', default='default', help='name or file (default: default)')

    fit = commands.add_parser('fit', help='train; continues where an earlier call stopped')
    fit.add_argument('maps', type=Path, help='file that `prepare` wrote')
    fit.add_argument('--out', type=Path, required=True, help='folder for checkpoint and log')
    fit.add_argument(
        '--stage',
        action='append',
        metavar='SPACING:XxYxZ:STEPS:BATCH',
        help=f'one stage, repeatable, coarse to fine (default: {" ".join(DEFAULT_STAGES)})',
    )
    fit.add_argument(
        '--start-from',
        metavar='NAME|FILE',
        help='model whose weights a new training starts with (default: random weights)',
    )
    fit.add_argument('--rate', type=float, default=3e-3, help='peak learning rate')
    fit.add_argument(
        '--scan-shares',
        type=float,
        nargs='+',
        metavar='SHARE',
        help='shares of samples with one, two, ... scans (default: as in the settings)',
    )
    fit.add_argument('--stop-at', type=int, help='stop at this step; a later call goes on')
    fit.add_argument('--threads', type=int, default=2, help='of the network (default: 2)')
    fit.add_argument('--workers', type=int, default=1, help='that draw images (default: 1)')
    fit.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    fit.add_argument(
        '--precision',
        choices=('auto', 'float32', 'bfloat16'),
        default='auto',
        help='of the network; auto is bfloat16 on GPUs and on CPUs that have it',
    )
    fit.add_argument(
        '--checkpointing', action='store_true', help='less memory for a tenth to a half more time'
    )
    fit.add_argument(
        '--validate-every',
        type=int,
        default=0,
        metavar='STEPS',
        help='segment synthetic scans of the held-out children now and then, with a picture',
    )
    fit.add_argument('--seed', type=int, default=0)
    fit.add_argument('--settings', default='default', metavar='NAME|FILE', help=_SETTINGS)
    fit.add_argument(
        '--compass',
        action='store_true',
        help='train the small network that tells which way a head lies, not the one that '
        f'segments (default stages: {" ".join(COMPASS_STAGES)})',
    )
    fit.add_argument(
        '--include-held-out', action='store_true', help='train on the held-out children too'
    )

    cases = argparse.ArgumentParser(add_help=False)
    cases.add_argument('maps', type=Path, help='file that `prepare` wrote')
    cases.add_argument('--model', default='default', help='name or file (default: default)')
    cases.add_argument('--samples', type=int, default=20, help='of each child (default: 20)')
    cases.add_argument('--scans', type=int, default=1, choices=(1, 2, 3, 4))
    cases.add_argument('--seed', type=int, default=0)
    cases.add_argument('--settings', default='default', metavar='NAME|FILE', help=_SETTINGS)
    cases.add_argument('--one-side', action='store_true', help='without the mirrored pass')
    evaluate = commands.add_parser(
        'evaluate', parents=[cases], help='Dice on synthetic scans of the held-out children'
    )
    evaluate.add_argument('--out', type=Path, help='table to write (.tsv)')
    calibrate = commands.add_parser(
        'calibrate',
        parents=[cases],
        help='fit the temperature on the held-out children, and measure calibration on new scans',
    )
    calibrate.add_argument('--out', type=Path, help='calibrated model to write (.safetensors)')

    tune = commands.add_parser(
        'finetune',
        help="adapt a model to a lab's own corrected label maps; refuses a result that is worse "
        'on the built-in validation brains',
    )
    tune.add_argument(
        '--corrections', type=Path, required=True, metavar='DIR', help='corrected *_dseg.nii.gz'
    )
    tune.add_argument('--out', type=Path, required=True, help='model to write (.safetensors)')
    tune.add_argument(
        '--ranking',
        type=Path,
        metavar='TSV',
        help='group_desc-babyseg_annotation.tsv: what it puts first is drawn more often',
    )
    tune.add_argument('--model', default='default', help='to start from (default: default)')
    tune.add_argument('--name', default='finetuned', help='recorded in the outputs')
    tune.add_argument('--steps', type=int, default=500, help='default: 500')
    tune.add_argument('--rate', type=float, default=2e-4, help='peak learning rate')
    tune.add_argument('--samples', type=int, default=2, help='of each brain in the comparison')
    tune.add_argument('--threads', type=int, default=2, help='of the network (default: 2)')
    tune.add_argument('--workers', type=int, default=1, help='that draw images (default: 1)')
    tune.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    tune.add_argument('--seed', type=int, default=0)
    tune.add_argument('--settings', default='default', metavar='NAME|FILE', help=_SETTINGS)
    tune.add_argument(
        '-w', '--work-dir', type=Path, help='for checkpoints (default: beside --out)'
    )

    export = commands.add_parser('export', help='write the averaged weights as a model file')
    export.add_argument('folder', type=Path, help='folder of `fit`')
    export.add_argument('--out', type=Path, required=True, help='file to write (.safetensors)')
    export.add_argument('--name', default='default')
    export.add_argument(
        '--mix',
        metavar='NAME|FILE',
        help='average with the weights of another model, such as the one that training started '
        'from',
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `babyseg-train`; returns the exit code."""
    args = build_parser().parse_args(arguments)
    commands = {
        'prepare': _prepare,
        'complete': _complete,
        'fit': _fit,
        'evaluate': _evaluate,
        'calibrate': _calibrate,
        'finetune': _finetune,
        'export': _export,
    }
    try:
        commands[args.command](args)
    except BabySegError as e:
        print(f'babyseg-train: {e}', file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _prepare(args: argparse.Namespace) -> None:
    import torch

    from babyseg_bids.synthesis.maps import prepare_map, save_maps
    from babyseg_bids.synthesis.morphing import estimate_shapes
    from babyseg_bids.synthesis.train import HELD_OUT

    prepared = []
    for path in args.label_maps:
        prepared.append(prepare_map(path))
        print(f'{path.name}: {prepared[-1].classes.shape}', flush=True)
    if not args.no_morphing:
        torch.set_num_threads(args.threads)
        logging.basicConfig(level=logging.INFO, format='%(message)s')
        prepared = estimate_shapes(prepared, held_out=HELD_OUT)
    if args.grow_white_matter:
        prepared = [_with_published_share(m) for m in prepared]
    save_maps(args.out, prepared)


def _with_published_share(drawn: 'TrainingMap') -> 'TrainingMap':
    from babyseg_bids.synthesis import proportions

    # A fetus counts as a newborn for its contrasts; no share is known for one.
    if drawn.age is None or drawn.age <= 0:
        return drawn
    grown = proportions.with_white_matter(drawn, proportions.published_share(drawn.age))
    before, after = (proportions.white_matter_share(m) for m in (drawn, grown))
    print(f'{drawn.name}: white matter {before:.3f} -> {after:.3f} of it and cortex', flush=True)
    return grown


def _complete(args: argparse.Namespace) -> None:
    import nibabel as nib

    from babyseg_bids.network.weights import load_model
    from babyseg_bids.synthesis.completion import complete

    stems = [path.name.split('.')[0] for path in args.tissue_maps]
    # The maps of an atlas often have one name, in a folder each.
    names = [
        path.resolve().parent.name if stems.count(stem) > 1 else stem
        for path, stem in zip(args.tissue_maps, stems, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UsageError('Two of the tissue maps would get one name; give them other names.')
    model = load_model(args.model)
    if model.official:
        raise UsageError('The official checkpoint has other labels; complete with our models.')
    args.out.mkdir(parents=True, exist_ok=True)
    for path, name in zip(args.tissue_maps, names, strict=True):
        out = args.out / f'{name}.nii.gz'
        nib.save(complete(path, model), out)
        print(out, flush=True)


def _fit(args: argparse.Namespace) -> None:
    import torch

    from babyseg_bids.network.device import cpu_prefers_bfloat16
    from babyseg_bids.network.weights import load_model
    from babyseg_bids.synthesis.maps import load_maps
    from babyseg_bids.synthesis.settings import load_settings
    from babyseg_bids.synthesis.train import HELD_OUT, Stage, Trainer, TrainingPlan, compass_plan

    for option in ('validate_every', 'start_from'):
        if args.compass and getattr(args, option):
            raise UsageError(
                'The compass segments nothing and starts from no model; with --compass, leave '
                f'--{option.replace("_", "-")} out.'
            )
    default = COMPASS_STAGES if args.compass else DEFAULT_STAGES
    stages = tuple(Stage.parse(s) for s in args.stage or default)
    settings = load_settings(args.settings)
    if args.scan_shares:
        settings = replace(settings, group_shares=tuple(args.scan_shares))
    device = args.device
    if 'RANK' in os.environ:  # Started by torchrun.
        torch.distributed.init_process_group('nccl' if device == 'cuda' else 'gloo')
        if device == 'cuda':
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
    prefers = device.startswith('cuda') or cpu_prefers_bfloat16()
    plan = (compass_plan if args.compass else TrainingPlan)(
        stages,
        seed=args.seed,
        rate=args.rate,
        synthesis=settings,
        bfloat16=args.precision == 'bfloat16' or (args.precision == 'auto' and prefers),
        checkpointing=args.checkpointing,
    )
    everyone = load_maps(args.maps)
    held_out = [m for m in everyone if m.name in HELD_OUT]
    maps = everyone if args.include_held_out else [m for m in everyone if m.name not in HELD_OUT]
    torch.set_num_threads(args.threads)
    trainer = Trainer(plan, args.out, device=device)
    if args.start_from and trainer.step == 0:
        trainer.start_from(load_model(args.start_from).network.state_dict())
    print(f'{len(maps)} maps; step {trainer.step} of {plan.steps}', flush=True)
    trainer.run(
        maps,
        workers=args.workers,
        stop=args.stop_at,
        validation=held_out,
        validate_every=args.validate_every,
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _cases(args: argparse.Namespace, model: 'Model') -> Iterator['Case']:
    """The cases that the options ask for."""
    from rich.console import Console
    from rich.progress import track

    from babyseg_bids.synthesis.evaluate import held_out_cases
    from babyseg_bids.synthesis.maps import load_maps
    from babyseg_bids.synthesis.settings import load_settings
    from babyseg_bids.synthesis.train import HELD_OUT

    everyone = load_maps(args.maps)
    maps = [m for m in everyone if m.name in HELD_OUT]
    if not maps:
        raise InputError(f'{args.maps} holds none of the held-out maps {", ".join(HELD_OUT)}.')
    cases = held_out_cases(
        model,
        maps,
        donors=[m for m in everyone if m.has_head],
        samples=args.samples,
        scans=args.scans,
        seed=args.seed,
        settings=load_settings(args.settings),
        both_sides=not args.one_side,
    )
    console = Console(stderr=True)
    return iter(
        track(
            cases,
            'Segmenting synthetic scans',
            total=len(maps) * args.samples,
            console=console,
            disable=not console.is_terminal,
        )
    )


def _evaluate(args: argparse.Namespace) -> None:
    from babyseg_bids.network.weights import load_model
    from babyseg_bids.synthesis.evaluate import evaluate, summarise

    dice = evaluate(_cases(args, load_model(args.model)))
    print(summarise(dice).to_string())
    if args.out:
        dice.to_csv(args.out, sep='\t', index=False, na_rep='n/a', float_format='%.4f')


def _calibrate(args: argparse.Namespace) -> None:
    import numpy as np

    from babyseg_bids.network.weights import load_model, save_model
    from babyseg_bids.synthesis.calibration import (
        dice_pairs,
        draw_voxels,
        expected_error,
        fit_temperature,
        join,
        review_coverage,
    )

    plain = replace(load_model(args.model), temperature=1.0)
    fitted = join([draw_voxels(case) for case in _cases(args, plain)])
    model = replace(plain, temperature=fit_temperature(fitted))
    # What is measured was not fitted on.
    args.seed += args.samples
    before = join([draw_voxels(case) for case in _cases(args, plain)])
    voxels, pairs = [], []
    for case in _cases(args, model):
        voxels.append(draw_voxels(case))
        pairs += dice_pairs(case)
    after = join(voxels)
    predicted, true = np.array(pairs).T
    print(f'temperature                       {model.temperature:.2f}')
    print(f'expected calibration error before {expected_error(before):.3f}')
    print(f'expected calibration error after  {expected_error(after):.3f}')
    print(f'predicted minus true Dice, mean   {(predicted - true).mean():+.3f}')
    print(f'predicted minus true Dice, |mean| {abs(predicted - true).mean():.3f}')
    print(f'correlation of the two            {np.corrcoef(predicted, true)[0, 1]:.3f}')
    print(review_coverage(after).round(3).to_string(index=False))
    if args.out:
        save_model(args.out, model)


def _finetune(args: argparse.Namespace) -> None:
    import torch

    from babyseg_bids.network.weights import load_model, save_model
    from babyseg_bids.synthesis.finetune import (
        TOLERANCE,
        finetune,
        read_corrections,
        read_ranking,
    )
    from babyseg_bids.synthesis.settings import load_settings

    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    if model.official:
        raise UsageError('The official checkpoint cannot be adapted here; start from our models.')
    adapted, comparison = finetune(
        model,
        read_corrections(args.corrections),
        args.work_dir or args.out.with_suffix('.work'),
        steps=args.steps,
        rate=args.rate,
        seed=args.seed,
        shares=read_ranking(args.ranking) if args.ranking else None,
        samples=args.samples,
        settings=load_settings(args.settings),
        workers=args.workers,
        device=args.device,
    )
    print('mean Dice on synthetic scans of             before  after')
    print(
        'the corrections                             {:.3f}   {:.3f}'.format(
            *comparison.corrections
        )
    )
    print('the built-in validation brains              {:.3f}   {:.3f}'.format(*comparison.guards))
    if comparison.worse:
        raise InputError(
            f'The adapted model lost more than {TOLERANCE} on the built-in validation brains and '
            'was not written; use fewer steps, a lower --rate, or check the corrections.'
        )
    adapted = replace(
        adapted,
        name=args.name,
        version=f'{model.name} {model.version}, adapted',
        training={**model.training, 'finetuned_steps': args.steps},
    )
    save_model(args.out, adapted)
    print(f'{args.out}: written; use it with --model {args.out}')


def _export(args: argparse.Namespace) -> None:
    import torch

    from babyseg_bids.network.compass import COMPASS_NETWORK, FORMAT
    from babyseg_bids.network.unet import GroupUNet, NetworkConfig
    from babyseg_bids.network.weights import load_model, new_model, save_model, write_network

    checkpoint = args.folder / 'checkpoint.pt'
    if not checkpoint.exists():
        raise InputError(f'{checkpoint} does not exist; train with `babyseg-train fit` first.')
    state = torch.load(checkpoint, map_location='cpu', weights_only=True)
    try:
        network = GroupUNet(NetworkConfig(**state['network_config']))
    except TypeError as e:
        raise InputError(
            f'{checkpoint} was written by another version of babyseg ({e}); export it with that '
            'version, or train again.'
        ) from e
    weights = state['averaged']
    if args.mix:
        other = load_model(args.mix).network.state_dict()
        if {k: x.shape for k, x in weights.items()} != {k: x.shape for k, x in other.items()}:
            raise UsageError(f'{args.mix} is another network than that of {args.folder}.')
        weights = {k: (x + other[k]) / 2 for k, x in weights.items()}
    network.load_state_dict(weights)
    training = {'steps': state['step'], 'stages': state['stages']}
    if network.config == COMPASS_NETWORK:
        write_network(args.out, network, FORMAT, {'version': __version__, 'training': training})
    else:
        if args.mix:
            training['mixed_with'] = str(args.mix)
        spacing = state['stages'][-1]['spacing']
        about = {'name': args.name, 'version': __version__, 'spacing': spacing}
        save_model(args.out, new_model(network, training=training, **about))
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    sys.exit(main())
