"""Flags that all pretraining scripts share, with SwAV's published names and defaults, and their settings for digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clusterssl.config import Size, require, require_numbers
from clusterssl.mirrors import MirrorOptions


@dataclass(frozen=True)
class DataOptions:
    """Images and crops."""

    data_path: str = "/path/to/imagenet"
    """folder of images (class folders or not, or packed by clusterssl.data.pack), a .txt list of files, "digits" (built
    in) or "synthetic"; without this flag the script trains on the digits with settings fit for them"""
    subset_file: str = ""
    """text file that names the classes to train on, one a line by its first word; all classes without it"""
    nmb_crops: tuple[int, ...] = (2,)
    """crops of each resolution, e.g. 2 6"""
    size_crops: tuple[Size, ...] = (Size(224, 224),)
    """size of the crops of each resolution in pixels, e.g. 224 96, or 224x112 for height x width"""
    min_scale_crops: tuple[float, ...] = (0.14,)
    """smallest area of the crops of each resolution, as a fraction of the image"""
    max_scale_crops: tuple[float, ...] = (1.0,)
    """largest area of the crops of each resolution, as a fraction of the image"""
    color_jitter: float = 0.8
    """strength s of the colour jitter: brightness, contrast and saturation s, hue s / 4"""
    color_jitter_p: float = 0.8
    """probability of the colour jitter"""
    gray_p: float = 0.2
    """probability of turning a crop grey"""
    blur_p: float = 0.5
    """probability of a Gaussian blur of radius 0.1 to 2 pixels"""
    flip_p: float = 0.5
    """probability of a horizontal flip"""
    workers: int = 10
    """loader processes per rank; at most the number of cores is used, 0 loads in the training process"""
    cache: Literal["auto", "ram", "disk", "device", "none"] = "auto"
    """images kept once they were read: small ones up to 1 GiB in memory (auto), all (ram: decoded up to 96 px, of
    larger ones the files), all in a file under TMPDIR that the ranks of a machine share (disk), none, or from the start
    all on the training device, to be cropped there (device)"""
    decode: Literal["cpu", "gpu"] = "cpu"
    """who decodes JPEGs: the workers, or the GPU (nvJPEG), which then crops and resizes, too, and workers only read"""
    data_patience_minutes: float = 10.0
    """minutes to wait for images whose file system is out of reach, before the run ends with 75, to be resumed"""
    max_bad_fraction: float = 0.01
    """share of unreadable images above which the run stops; below, they are replaced and listed in bad_images.txt"""

    def __post_init__(self) -> None:
        lists = {
            name: getattr(self, name) for name in ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
        }
        lengths = ", ".join(f"--{name} has {len(values)}" for name, values in lists.items())
        require(
            len({len(values) for values in lists.values()}) == 1,
            f"{lengths}: the four lists need one value per resolution",
        )
        require_numbers(self, "nmb_crops", least=1)
        for low, high in zip(self.min_scale_crops, self.max_scale_crops, strict=True):
            require(0 < low <= high <= 1, f"--min_scale_crops {low} --max_scale_crops {high}: need 0 < min <= max <= 1")
        both = self.cache == "device" and self.decode == "gpu"
        require(not both, "--cache device --decode gpu: images on the device are decoded once; leave --decode out")
        require_numbers(self, "workers", "data_patience_minutes", least=0)
        require_numbers(self, "color_jitter", least=0, most=2)
        require_numbers(self, "color_jitter_p", "gray_p", "blur_p", "flip_p", "max_bad_fraction", least=0, most=1)


@dataclass(frozen=True)
class TrunkOptions:
    """Network."""

    arch: str = "resnet50"
    """resnet18, 34, 50, 50w2, 50w4, 50w5, conv4 (tiny images), any torchvision classification model, or timm:NAME"""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """first layers of a ResNet: imagenet (7x7, stride 2, max-pool) or small (3x3); auto: small for crops up to 64 px"""
    init: str = ""
    """checkpoint (file or URL, published or own) to start the weights from"""
    sync_bn: str = "pytorch"
    """BatchNorm statistics over all ranks (pytorch), over groups of ranks (apex), or per rank (none)"""
    syncbn_process_group_size: int = 8
    """ranks per group with --sync_bn apex"""
    use_fp16: bool = True
    """mixed precision on GPUs"""
    amp_dtype: Literal["bf16", "fp16"] = "bf16"
    """number format of mixed precision; fp16 is used where the GPU has no bf16"""
    channels_last: bool = True
    """memory layout in which convolutions are fastest, on CPUs and on GPUs with mixed precision"""
    compile: bool = False
    """compile the backbone, and on GPUs the augmentation, with torch.compile"""
    cuda_graphs: bool = False
    """--compile, and replay the backbone's kernels as CUDA graphs: for small networks on one GPU"""

    def __post_init__(self) -> None:
        known = ("pytorch", "apex", "none")
        require(self.sync_bn in known, f"--sync_bn {self.sync_bn}: use pytorch, apex or none")
        require_numbers(self, "syncbn_process_group_size", least=0)

    @property
    def compiled(self) -> bool:
        """Whether the network is compiled, in either way."""
        return self.compile or self.cuda_graphs


@dataclass(frozen=True)
class ModelOptions(TrunkOptions):
    """Network."""

    hidden_mlp: int = 2048
    """hidden width of the projection head; 0: a single linear layer"""
    feat_dim: int = 128
    """dimension of the embedding"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, "hidden_mlp", least=0)
        require_numbers(self, "feat_dim", least=1)


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation."""

    epochs: int = 100
    """passes over the images"""
    batch_size: int = 64
    """images per rank and backward pass; a step sees batch_size x accumulate x ranks"""
    auto_batch: bool = False
    """the largest batch that fits instead; learning rates and queues follow, from those given for --batch_size"""
    accumulate: int = 1
    """backward passes per step; assignments and queue see the whole step (costs one extra forward pass of it)"""
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """lars is the published one"""
    base_lr: float = 4.8
    """highest learning rate; it is not scaled with the batch"""
    final_lr: float = 0.0
    """learning rate the cosine ends at"""
    wd: float = 1e-6
    """weight decay"""
    warmup_epochs: int = 10
    """epochs of linear warm-up; a run that is no longer than that warms up for the first tenth of its steps"""
    start_warmup: float = 0.0
    """learning rate at the start of the warm-up"""
    clip_grad: float = 0.0
    """largest norm of the gradient of each parameter tensor, longer ones are scaled to it; 0: none is"""
    momentum: float = 0.9
    """of lars and sgd"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """of the learning rate; only cosine looks at --warmup_epochs, --start_warmup and --final_lr"""

    def __post_init__(self) -> None:
        require_numbers(self, "epochs", "batch_size", "accumulate", least=1)
        require_numbers(self, "warmup_epochs", "base_lr", "final_lr", "wd", "start_warmup", "clip_grad", least=0)
        require_numbers(self, "momentum", least=0, below=1)

    @property
    def usable_warmup(self) -> float:
        """Epochs of warm-up; a tenth of a run that would end in the warm-up asked for, at the highest rate."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 10


@dataclass(frozen=True)
class RunOptions(MirrorOptions):
    """Run directory, checkpoints, ranks."""

    dump_path: str = "."
    """run directory; the same command there resumes by itself"""
    checkpoint_freq: int = 25
    """epochs between two kept checkpoints under checkpoints/; 0: only the last"""
    checkpoint_minutes: float = 10.0
    """minutes between two checkpoints inside an epoch (every epoch ends with one); 0: after every step"""
    log_freq: int = 10
    """steps between two records in metrics.jsonl"""
    stop_on_collapse: bool = False
    """end with exit code 2 when the monitor names a collapse, instead of only warning"""
    report: bool = True
    """write report.html when the run has ended, with clusters of its images if they are at hand; 3 minutes at most"""
    profile: int = 0
    """steps, after a few others, whose time is taken apart: a table and a trace under profile/ in the run directory"""
    seed: int = 31
    """of weights, order, crops and augmentation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    grad_compression: Literal["none", "bf16"] = "none"
    """format in which ranks exchange gradients: their own (none), or bf16, half the bytes and 8 bits of precision"""
    dist_url: str = "env://"
    """where ranks meet; env:// reads torchrun's or Slurm's variables"""
    timeout_minutes: float = 30.0
    """minutes after which a rank that waits for the others gives up"""
    hang_minutes: float = 20.0
    """minutes after which a rank in which nothing moves says where it hangs and ends with 75; 0: it waits for ever"""
    join_timeout_seconds: float = 50.0
    """seconds after which, at the start, missing ranks are named and the others end"""
    world_size: int = -1
    """accepted and ignored: the launcher says it"""
    rank: int = 0
    """accepted and ignored: the launcher says it"""
    local_rank: int = 0
    """accepted and ignored: the launcher says it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, "log_freq", least=1)
        require_numbers(self, "profile", "checkpoint_freq", "checkpoint_minutes", "hang_minutes", least=0)
        require_numbers(self, "seed", least=0, most=2**31 - 1)
        require_numbers(self, "timeout_minutes", "join_timeout_seconds", above=0)


def num_views(data: DataOptions) -> int:
    """Crops of one image."""
    return sum(data.nmb_crops)


def require_crops(crops_for_assign: tuple[int, ...], views: int) -> None:
    """Refuse crops that do not exist, or that are named twice."""
    words = f"--crops_for_assign {' '.join(map(str, crops_for_assign))}"
    fits = all(0 <= crop < views for crop in crops_for_assign)
    require(fits, f"{words}: there are {views} crops, use numbers 0 to {views - 1}")
    require(len(set(crops_for_assign)) == len(crops_for_assign), f"{words}: name each crop once")


DIGITS_DATA = DataOptions(
    data_path="digits", size_crops=(Size(32, 32),), min_scale_crops=(0.4,), color_jitter=0.5, gray_p=0.0, flip_p=0.0,
    workers=0,
)  # fmt: skip
"""ink and background vary and strokes blur, but there is no colour, and a flipped digit is another one"""
DIGITS_TRUNK = TrunkOptions(arch="conv4")
DIGITS_MODEL = ModelOptions(arch="conv4", hidden_mlp=128, feat_dim=32)
DIGITS_OPTIM = OptimOptions(epochs=60, batch_size=100, optimizer="adamw", base_lr=3e-3, warmup_epochs=3)
