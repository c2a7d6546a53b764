"""How well samples can be told from pictures: the classifier two-sample test."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_genmod.data.value_range import to_model_range
from hf_genmod.evaluation.estimates import Share
from hf_genmod.models.initial_weights import SeededWeights
from hf_genmod.processes import multiplies_in_bf16, processes

_HALVINGS = 2
_BATCH_SIZE = 64
_STUDENT = 3.18  # the 97.5% quantile of Student's t with as many degrees of freedom as judges, less one


class Judge(nn.Module):
    """
    A small convolutional network that says of images (n, C, H, W) in [-1, 1] whether they are samples: a logit (n,).
    It sees the images, and their high frequencies: how each pixel differs from the mean of its 3x3 neighbourhood,
    enlarged, so that noise of one grey level is not lost beside the picture. The first convolution leaves about 16x16
    positions, so that large images cost little more.
    """

    def __init__(self, in_channels: int, size: int, width: int = 32):
        super().__init__()
        first = max(1, round(size / 16))
        layers, c_in = [], 2 * in_channels
        for c_out, kernel_size, stride in ((width, max(3, first), first), (2 * width, 3, 2), (4 * width, 3, 2)):
            convolution = nn.Conv2d(c_in, c_out, kernel_size, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * c_in, 1)

    def forward(self, images: Tensor) -> Tensor:
        smooth = F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, stride=1)
        x = torch.cat([images, torch.tanh(64 * (images - smooth))], dim=1)
        h = self.body(x)
        return self.head(torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)).squeeze(1)


def told_apart(samples: Tensor, pictures: Tensor, seed: int = 0, longer: int = 1) -> Share:
    """
    The share of images, half of them samples and half pictures, of which a [`Judge`] that learned from others says
    rightly what they are: 50% if nothing tells samples from pictures, 100% if each is told at a glance (Lopez-Paz and
    Oquab 2017, https://arxiv.org/abs/1610.06545). Both are cut into halves at random; one judge learns from the first
    halves and is asked about the second, another the other way round; and once more with other halves. The interval
    is Wilson's of all images or, where it is wider, Student's of the four judges: one may learn more than another.

    Args:
        samples, pictures (`torch.Tensor`): (n, C, H, W) and (m, C, H, W), uint8. Of the larger set a random min(n, m)
            are used.
        seed (`int`): The seed of the halves, and of the judges. The global random state is neither used nor changed.
        longer (`int`): How many times longer than by default a judge learns. By default it sees 300 batches of 64
            images, and each image at most 50 times.

    Raises:
        ValueError: If there are fewer than two of either, or they differ in C, H or W.
    """
    n = min(len(samples), len(pictures))
    if n < 2 or samples.shape[1:] != pictures.shape[1:]:
        shapes = f"shapes {tuple(samples.shape)} and {tuple(pictures.shape)}"
        raise ValueError(f"samples and pictures: {shapes}; give two or more images of one size of each")
    rng = torch.Generator().manual_seed(seed)
    right, train_steps = [], longer * min(300, -(-50 * n // _BATCH_SIZE))
    device = processes().device
    fast = torch.autocast(device.type, torch.bfloat16, enabled=multiplies_in_bf16(device), cache_enabled=False)
    what = "Learning to tell samples from pictures"
    with fast, tqdm(total=2 * _HALVINGS * train_steps, desc=what, leave=False, disable=None) as bar:
        for halving in range(_HALVINGS):
            chosen = [x[torch.randperm(len(x), generator=rng)[:n]].to(device) for x in (samples, pictures)]
            halves = [torch.cat(parts) for parts in zip(*(x.tensor_split(2) for x in chosen), strict=True)]
            answers = [torch.arange(len(half), device=device) < len(half) // 2 for half in halves]
            for learned, asked in ((0, 1), (1, 0)):
                judge_seed = 2 * (_HALVINGS * seed + halving) + learned
                judge = _trained(halves[learned], answers[learned], judge_seed, train_steps, bar)
                with torch.no_grad():
                    logits = torch.cat([judge(to_model_range(part)) for part in halves[asked].split(256)])
                right.append(((logits > 0) == answers[asked]).double().cpu())
    share = Share.of(torch.cat(right).view(_HALVINGS, -1).mean(dim=0))
    spread = _STUDENT * torch.stack([answers.mean() for answers in right]).std().item() / len(right) ** 0.5
    low, high = min(share.low, share.value - spread), max(share.high, share.value + spread)
    return replace(share, low=max(low, 0.0), high=min(high, 1.0))


def _trained(images: Tensor, is_sample: Tensor, seed: int, train_steps: int, bar: tqdm) -> Judge:
    with SeededWeights(seed):
        judge = Judge(images.shape[1], max(images.shape[-2:]))
    judge = judge.to(images.device, memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(seed)
    epochs = -(-train_steps * _BATCH_SIZE // len(images))
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(epochs)])
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=train_steps)
    for index in order[: train_steps * _BATCH_SIZE].split(_BATCH_SIZE):
        loss = F.binary_cross_entropy_with_logits(judge(to_model_range(images[index])), is_sample[index].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return judge.eval()
