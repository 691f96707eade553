"""Builds and loads the fake devices: after `install()` 'fakegpu' (`fakegpu:0`) and `fakegpu:1` exist in this process.

They compute on the CPU and refuse what CUDA refuses: `.numpy()` of a tensor, tensors of two devices in an operation.
torch calls `install` by itself in every process that finds `fakegpu.dist-info` (`announce`) on its path."""
import hashlib, os, tempfile, types
from pathlib import Path

SOURCE = Path(__file__).with_name("fakegpu.cpp")


def library(torch) -> Path:
    "The built library; it is built once for each source and version of torch (under a minute, needs g++ and ninja)."
    made_of = SOURCE.read_bytes() + torch.__version__.encode()
    folder = Path(os.environ.get("RCID_FAKEGPU", tempfile.gettempdir()))/hashlib.sha256(made_of).hexdigest()[:16]
    built = folder/"fakegpu.so"
    if not built.exists():
        from torch.utils.cpp_extension import load
        folder.mkdir(parents=True, exist_ok=True)
        load("fakegpu", [str(SOURCE)], build_directory=str(folder), is_python_module=False)
    return built


def module(torch) -> types.ModuleType:
    "What torch asks a device for, as `torch.cuda` has it."
    said = types.ModuleType("torch.fakegpu")
    said.is_available = said.is_initialized = lambda: True
    said.device_count = lambda: 2
    said.current_device = lambda: 0
    said.set_device = said.synchronize = said.manual_seed = said.manual_seed_all = lambda *_: None
    said._is_in_bad_fork = lambda: False
    said.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    said.get_rng_state = lambda *_: torch.get_rng_state()
    said.set_rng_state = lambda *_: None
    return said


def install():
    "Registers the device; a second call does nothing."
    import torch
    if hasattr(torch, "fakegpu"): return
    torch.utils.rename_privateuse1_backend("fakegpu")
    torch._register_device_module("fakegpu", module(torch))
    torch.ops.load_library(library(torch))
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    # else every module gets a parameter of its own when it is moved, and tied weights are tied no more
    torch.__future__.set_swap_module_params_on_conversion(True)
    for kind in (torch.Tensor, torch.nn.Parameter): kind.__deepcopy__ = copies(torch, kind.__deepcopy__)


def copies(torch, plain):
    "`copy.deepcopy` of a tensor, `plain` where it is not on the device."
    def deepcopy(self, memo):
        if self.device.type != "fakegpu": return plain(self, memo)
        if id(self) not in memo:
            new = self.detach().clone()
            if isinstance(self, torch.nn.Parameter): new = torch.nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]
    return deepcopy


def announce(folder: Path):
    "Makes torch load the device by itself in every process that has `folder` on its path: torch's own way of doing so."
    for file in (SOURCE, Path(__file__)): (folder/file.name).write_bytes(file.read_bytes())
    told = folder/"fakegpu-1.dist-info"
    told.mkdir(exist_ok=True)
    (told/"METADATA").write_text("Metadata-Version: 2.1\nName: fakegpu\nVersion: 1\n")
    (told/"entry_points.txt").write_text("[torch.backends]\nfakegpu = fakegpu:install\n")
