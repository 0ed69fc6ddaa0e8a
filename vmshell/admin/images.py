"""The `image` verbs of vmshell-admin: build, list, check, rm.

Runs in: vmshell-admin. Touches the catalogue and the package cache.
"""

from __future__ import annotations

import os
import subprocess

from ..errors import EX_VM_FAILED, BadValue
from ..layout import Layout
from ..names import check_name, format_size
from ..refusals import BuildFailed, CannotTell, ImageDamaged, NoSuchImage, StorageFailed
from . import image_build, usage
from .catalogue import Catalogue, Image
from .disk import DiskError
from .modules import ModuleMissing
from .packages import PackageError, Packages
from .verbs import Arguments, Context


def build(context: Context, args: Arguments) -> None:
    """Build a recipe into the catalogue; on any failure the catalogue is as it was."""
    kind = args["IMAGE"]
    recipe = image_build.RECIPES.get(kind)
    if recipe is None:
        raise BadValue(field="image", value=repr(kind), rule=f"one of {', '.join(image_build.RECIPES)}")
    name = check_name(args.get("--as", kind), "image")
    context.must_be_root("building an image")
    catalogue = Catalogue(context.layout)
    try:
        with catalogue.locked():
            catalogue.must_be_replaceable(name)
            packages = Packages(cache_dir(context.layout), context.say)
            with catalogue.workspace() as work:
                folder, image, origin = image_build.build(recipe, name, packages, work, context.say)
                catalogue.publish(folder, image, origin)
    except (PackageError, ModuleMissing, DiskError) as exc:
        raise BuildFailed(image=name, problem=exc) from exc
    except OSError as exc:
        raise BuildFailed(image=name, problem=_reason(exc)) from exc
    except subprocess.SubprocessError as exc:
        raise BuildFailed(image=name, problem="busybox does not run on this host") from exc
    print(f"{name}: ready ({_size(catalogue, catalogue.read(name))}); try `new web1 --image {name}`")


def show(context: Context, args: Arguments) -> None:
    """Print the catalogue."""
    context.must_be_root("looking into the catalogue")
    catalogue = Catalogue(context.layout)
    rows = [("NAME", "BOOTS", "SIZE", "MEMORY", "VMS", "DESCRIPTION")]
    names = catalogue.names()
    counts = _user_counts(context, names)
    for name in names:
        try:
            image = catalogue.read(name)
        except ImageDamaged as exc:
            rows.append((name, "-", "-", "-", counts.get(name, "?"), f"damaged: {exc.fields['problem']}"))
            continue
        boots = "kernel" if image.boot else "disk"
        row = (name, boots, _size(catalogue, image), f"{image.memory_min}M", counts.get(name, "?"), image.description)
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip())


def _user_counts(context: Context, names: list[str]) -> dict[str, str]:
    """By image, how many VMs use it; nothing, and a word about it, where nobody can say."""
    try:
        return {name: str(count) for name, count in usage.user_counts(context.layout, names).items()}
    except CannotTell as exc:
        context.say(exc.sentence())
        return {}


def check(context: Context, args: Arguments) -> int:
    """Compare every file with its hash; the status says whether all were whole."""
    context.must_be_root("looking into the catalogue")
    catalogue = Catalogue(context.layout)
    status = 0
    for name in args.all("NAME") or catalogue.names():
        check_name(name, "image")
        try:
            image = catalogue.read(name)
            problem = catalogue.problem(image)
        except ImageDamaged as exc:
            problem = exc.fields["problem"]
        except OSError as exc:
            problem = _reason(exc)
        print(f"{name}: {'damaged: ' + problem if problem else 'ok'}")
        status = EX_VM_FAILED if problem else status
    return status


def remove(context: Context, args: Arguments) -> None:
    """Delete an image no VM refers to."""
    name = check_name(args["NAME"], "image")
    context.must_be_root("removing an image")
    catalogue = Catalogue(context.layout)
    if not catalogue.exists(name):
        raise NoSuchImage(image=name)
    try:
        with catalogue.locked():
            catalogue.must_be_unused(name, "remove those VMs first")
            catalogue.remove(name)
    except OSError as exc:
        raise StorageFailed(problem=_reason(exc)) from exc
    print(f"{name}: removed")


def cache_dir(layout: Layout) -> str:
    """Where packages are kept: the host's cache for the host's installation, else one's own."""
    if layout.state == Layout.system().state:
        return "/var/cache/vmshell"
    own = os.environ.get("XDG_CACHE_HOME", "")
    return (own if own.startswith("/") else os.path.expanduser("~/.cache")) + "/vmshell"


def _size(catalogue: Catalogue, image: Image) -> str:
    """What the image's files occupy; a disk is mostly holes."""
    folder = f"{catalogue.path}/{image.name}"
    return format_size(sum(os.stat(f"{folder}/{file}").st_blocks * 512 for file in os.listdir(folder)))


def _reason(exc: OSError) -> str:
    about = f" ({exc.filename})" if isinstance(exc.filename, str) else ""
    return f"{exc.strerror or exc}{about}"
