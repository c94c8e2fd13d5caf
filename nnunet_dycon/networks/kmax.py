"""The k-means mask transformer: queries that voxels are assigned to, and that move to the mean of their voxels."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from nnunet_dycon.networks.uxnet import Architecture
from nnunet_dycon.precision import without_autocast

# Entries of a block of queries × voxels: 2^18 are 1 MiB in float32, which a core's cache holds; a GPU wants fewer
# blocks.
_BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**24}
_KERNEL = 5
_HEADS = 8
_HIDDEN = 64  # of the class head


class KMaXOutput(NamedTuple):
    """What the decoder says at each resolution, highest first.

    Attributes:
        logits: (B, K, *spatial) each, the segmentation.
        queries: (B, K, *spatial) each, the logarithm of the share of each class's queries in a voxel.
    """

    logits: list[torch.Tensor]
    queries: list[torch.Tensor]


def group_sizes(queries: int, groups: int) -> list[int]:
    """How many queries each group has: the first ones the first, and so on, as equally many as possible.

    Raises:
        ValueError: there are fewer queries than groups.

    >>> group_sizes(128, 3)
    [43, 43, 42]
    """
    if queries < groups:
        raise ValueError(f"each class needs a query of its own: there are {groups} classes, but only {queries} queries")
    each, more = divmod(queries, groups)
    return [each + (group < more) for group in range(groups)]


def merged(log_responses: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    r"""The queries' responses merged into one for each group.

    .. math:: \ln q_{gi} = \ln \sum_{n \in g} r_{ni}

    Args:
        log_responses: (B, N, V) ln r, a distribution over the N queries in each of V voxels.
        sizes: of the groups.

    Returns:
        (B, G, V) ln q, a distribution over the groups.
    """
    return torch.stack([group.logsumexp(1) for group in log_responses.split(list(sizes), 1)], 1)


def cluster_means(values: torch.Tensor, assignment: torch.Tensor, clusters: int) -> torch.Tensor:
    """The mean of the voxels of each cluster, 0 for one that has none.

    Args:
        values: (B, C, V).
        assignment: (B, V), integers in [0, N).
        clusters: N.

    Returns:
        (B, N, C), in float32.
    """
    batch, channels, _ = values.shape
    sums = torch.zeros(batch, clusters, channels, device=values.device)
    sums = sums.scatter_add(1, assignment[:, :, None].expand(-1, -1, channels), values.float().transpose(1, 2))
    counts = sums.new_zeros(batch, clusters).scatter_add(1, assignment, sums.new_ones(assignment.shape))
    return sums / counts.clamp(min=1)[:, :, None]


class CenterUpdate(nn.Module):
    """One step of k-means and of a transformer: to the mean of their voxels, then attention among the queries."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.of_voxels = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.attention = nn.TransformerEncoderLayer(
            width, math.gcd(_HEADS, width), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    @torch.compiler.disable  # compiled for each width anew, it would run into torch's limit
    def forward(self, centers: torch.Tensor, values: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
        """(B, N, D), (B, C, V) and (B, V) to (B, N, D)."""
        means = cluster_means(values, assignment, centers.shape[1])
        return self.attention(centers + self.of_voxels(means))


class KMaXLevel(nn.Module):
    """Voxels and queries of one resolution: embeds both, assigns, and updates the queries so many times."""

    def __init__(self, architecture: Architecture, stage: int, width: int, updates: int) -> None:
        super().__init__()
        channels = architecture.features_per_stage[stage]
        self.embedding = nn.Sequential(
            architecture.depth_wise(stage, channels, _KERNEL),
            architecture.norm_op(channels, **architecture.norm_op_kwargs),
            nn.GELU(),
            architecture.conv_op(channels, channels, 1),
        )
        self.kernels = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.values = architecture.conv_op(channels, channels, 1) if updates else None
        self.updates = nn.ModuleList(CenterUpdate(width, channels) for _ in range(updates))

    def forward(self, pixels: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, *spatial) and (B, N, D) to voxels (B, C, V) of length 1, kernels (B, N, C), and (B, N, D)."""
        embedded = normalize(self.embedding(pixels), dim=1).flatten(2)
        if self.values is not None:
            values = self.values(pixels).flatten(2)
            for update in self.updates:
                centers = update(centers, values, assign(embedded, self.kernels(centers)))
        return embedded, self.kernels(centers), centers


@torch.no_grad()
@torch.compiler.disable  # which would write the loop out
def assign(embedded: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The query that each voxel is most similar to: (B, C, V) and (B, N, C) to (B, V); it has no gradient."""
    kernels = kernels.float()
    with without_autocast(embedded.device.type):
        return torch.cat([(kernels @ block.float()).argmax(1) for block in _blocks(embedded, kernels)], 1)


@torch.compiler.disable
def respond(
    embedded: torch.Tensor, kernels: torch.Tensor, classes: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What all queries together say of each voxel.

    .. math:: r_{ni} = \mathrm{softmax}_n(k_n \cdot z_i), \qquad l_{ki} = \sum_n c_{nk} r_{ni}, \qquad
        \ln q_{gi} = \ln \sum_{n \in g} r_{ni}

    The responses (B, N, V) never exist as a whole: the backward pass computes them again, block by block.

    Args:
        embedded: (B, C, V) z.
        kernels: (B, N, C) k.
        classes: (B, N, K) c.
        sizes: of the groups g.

    Returns:
        The segmentation l and the query distribution ln q, in float32: (B, K, V) and (B, G, V).
    """
    return _Respond.apply(embedded, kernels.float(), classes.float(), sizes)


class _Respond(torch.autograd.Function):
    """The response, whose gradient is written down instead of recorded."""

    @staticmethod
    def forward(ctx, embedded, kernels, classes, sizes):
        ctx.save_for_backward(embedded, kernels, classes)
        ctx.sizes = sizes
        logits, queries = [], []
        with without_autocast(embedded.device.type):
            for block in _blocks(embedded, kernels):
                log_responses = torch.log_softmax(kernels @ block.float(), 1)
                queries.append(merged(log_responses, sizes))
                logits.append(classes.transpose(1, 2) @ log_responses.exp_())
        return torch.cat(logits, 2), torch.cat(queries, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_logits, of_queries):
        r"""With the gradients u of l and w of ln q, and the group g(n) of a query, a voxel's similarity s = k z has

        .. math:: \frac{\partial L}{\partial s_n} = r_n \left(a_n - \sum_m r_m a_m - \sum_g w_g\right)
            + \frac{r_n}{q_{g(n)}} w_{g(n)}, \qquad a_n = \sum_k c_{nk} u_k
        """
        embedded, kernels, classes = ctx.saved_tensors
        of_kernels, of_classes = torch.zeros_like(kernels), torch.zeros_like(classes)
        of_embedded = torch.empty_like(embedded)
        blocks = (_blocks(volume, kernels) for volume in (embedded, of_logits, of_queries, of_embedded))
        with without_autocast(embedded.device.type):
            for block, u, w, of_block in zip(*blocks):
                voxels = block.float()
                log_responses = torch.log_softmax(kernels @ voxels, 1)
                responses = log_responses.exp()
                of_classes += responses @ u.transpose(1, 2)
                a = classes @ u
                slope = responses * (a - (responses * a).sum(1, keepdim=True) - w.sum(1, keepdim=True))
                shares = [part.log_softmax(1).exp_() for part in log_responses.split(ctx.sizes, 1)]  # of a group
                slope += torch.cat([share * part for share, part in zip(shares, w.split(1, 1))], 1)
                of_kernels += slope @ voxels.transpose(1, 2)
                of_block.copy_(kernels.transpose(1, 2) @ slope)
        return of_embedded, of_kernels, of_classes, None


def _blocks(volume: torch.Tensor, kernels: torch.Tensor) -> Iterator[torch.Tensor]:
    entries = _BLOCK_ENTRIES.get(volume.device.type, 2**20)
    yield from volume.split(max(1, entries // (kernels.shape[0] * kernels.shape[1])), 2)


class KMaXDecoder(nn.Module):
    """The transformer decoder of kMaX-DeepLab (Yu et al., ECCV 2022, arXiv:2207.04044) over a U-Net's decoder.

    N learned queries go from the deepest resolution to the highest. At each but the highest they are updated twice:
    each voxel is assigned to the query most similar to it (argmax, k-means' hard assignment, without a gradient), and
    each query moves to the mean of its voxels. A head gives each query logits of the K classes; a voxel's segmentation
    is their mean, weighted with the voxel's softmax over queries. The queries belong to K groups, one per class; the
    sum of that softmax over a group is the voxel's query distribution.

    Deviations from DK-UXNet's released code (Rows21/DK-UXNet, e268484), whose network this is:

    - one group for each class, equally large, instead of 16, 4 and 108 of 128 queries for background, organ and tumor;
    - segmentation and query distribution at every resolution, for deep supervision. The release has them at the highest
      alone, so that what assigns voxels below is never trained; here both use the same kernels, and without deep
      supervision it is not trained, either;
    - updates at all resolutions but the highest, as in its variant UXNET; its DKUNET leaves out the one before, too;
    - layer norm for queries and the plans' norm for voxels instead of batch norm; a query moves to the mean of its
      voxels instead of their sum, which would grow with the patch;
    - widths follow the plans: voxels are embedded as wide as their features, queries as the deepest stage (256 there);
    - one class head for all queries (width → 64 → K) instead of one over all of them flattened.

    Args:
        architecture: as in the plans.
        num_classes: K, background included.
        queries: N, at least K.
        updates: of the queries at each resolution.

    Raises:
        ValueError: there are fewer queries than classes.
    """

    def __init__(self, architecture: Architecture, num_classes: int, queries: int, updates: int = 2) -> None:
        super().__init__()
        self.group_sizes = group_sizes(queries, num_classes)
        width = architecture.features_per_stage[-1]
        self.centers = nn.Parameter(torch.randn(queries, width))
        deepest = len(architecture.features_per_stage) - 2
        self.levels = nn.ModuleList(
            KMaXLevel(architecture, stage, width, updates if stage > 0 else 0) for stage in range(deepest, -1, -1)
        )
        # The last layer, whose shape depends on the classes, has the name by which nnU-Net leaves such layers out of
        # pretrained weights.
        self.class_embedding = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU())
        self.seg_layers = nn.Linear(_HIDDEN, num_classes)

    def forward(self, pixels: Sequence[torch.Tensor], all_levels: bool = True) -> KMaXOutput:
        """Features (B, C, *spatial) of each resolution, lowest first, to the output at all of them, or the highest."""
        output = KMaXOutput([], [])
        centers = self.centers.expand(len(pixels[0]), -1, -1)
        for index, (level, features) in enumerate(zip(self.levels, pixels), start=1):
            embedded, kernels, centers = level(features, centers)
            if all_levels or index == len(self.levels):
                classes = self.seg_layers(self.class_embedding(centers))
                answers = respond(embedded, kernels, classes, self.group_sizes)
                for kind, answer in zip(output, answers):
                    kind.insert(0, answer.unflatten(2, features.shape[2:]))
        return output
