"""The verbs that tell about the service itself: images, whoami, version.

Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import VmshellError
from ...messages import Images as ImagesRequest
from ...messages import Version, Whoami
from ..network import passt
from .pages import PAGE_ROWS, PAGE_SHARE, fitting

if TYPE_CHECKING:
    from ..host.processes import Host
    from ..policies import Policies
    from ..runtime.call import Call
    from ..services.capabilities import Capabilities
    from ..storage.image_catalogue import Image
    from ..storage.images import Images
    from ..vm.registry import Registry
    from .table import Handlers


class AboutHandlers:
    """Tells who asks, what there is and what this host can do."""

    def __init__(
        self, *, embedded: bool, host: Host, policies: Policies, registry: Registry, images: Images, capabilities: Capabilities
    ) -> None:
        self._embedded = embedded
        self._host = host
        self._policies = policies
        self._registry = registry
        self._images = images
        self._capabilities = capabilities

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {ImagesRequest: self._images_page, Whoami: self._whoami, Version: self._version}

    def _images_page(self, call: Call, request: ImagesRequest) -> None:
        names = [name for name in self._images.names() if name > request.after]
        rows = []
        for name in names[:PAGE_ROWS]:
            try:
                rows.append(_image(self._images.get(name)))
            except VmshellError as exc:
                rows.append({"name": name, "description": exc.sentence(), "boot": "", "disk": 0, "memory_min": 0})
        shown = fitting(rows, PAGE_SHARE)
        call.reply({"images": shown, "more": len(names) > len(shown)})

    def _whoami(self, call: Call, request: Whoami) -> None:
        peer = call.peer
        effective, used = self._policies.effective(peer.user), self._registry.used(peer.uid)
        call.reply(
            {
                "user": peer.user,
                "uid": peer.uid,
                "admin": peer.admin,
                "mode": self._mode(),
                "limits": effective.numbers(),
                "catalogue": effective.choices(),
                "wrapper_options": effective.limits.wrapper_options and sorted(effective.limits.wrapper_options),
                "used": vars(used),
            }
        )

    def _version(self, call: Call, request: Version) -> None:
        def answer() -> None:
            facts = self._capabilities
            call.reply(
                {
                    "version": __version__,
                    "qemu": facts.qemu,
                    "accel": facts.accel,
                    "reason": facts.reason,
                    "problem": facts.problem,
                    "mode": self._mode(),
                    "lacks": self._lacks(),
                }
            )

        self._capabilities.when_known(answer)

    def _mode(self) -> str:
        return "session" if self._embedded else "system"

    def _lacks(self) -> list[str]:
        """What this mode or host cannot do, a sentence each."""
        facts, host = self._capabilities, self._host
        lacks = []
        if facts.problem:
            lacks.append(facts.problem)
        if facts.accel == "tcg":
            lacks.append(f"guests run emulated (TCG), ten to twenty times slower than with KVM: {facts.reason}")
        if not host.apart:
            lacks.append("every guest's QEMU runs under your own uid: jailed, but without a uid of its own")
        if not host.systemd:
            lacks.append("no limits by control group: there is no service manager to ask")
        if self._embedded and not passt.available():
            lacks.append("guests have a network of their own with DHCP, and no way out of it: apt-get install passt")
        return lacks


def _image(image: Image) -> dict[str, Any]:
    return {
        "name": image.name,
        "description": image.description[:200],
        "boot": "kernel" if image.kernel else "disk",
        "disk": image.disk_size,
        "memory_min": image.memory_min,
    }
