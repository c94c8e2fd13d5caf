"""k-means mask transformer. Queries are learned vectors that serve as cluster centers, as in k-means.

Each voxel is assigned to the most similar query, and each query is updated with the mean of its assigned voxels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from nnunet_dycon.networks.uxnet import Architecture
from nnunet_dycon.system.precision import without_autocast

# Entries of a block of queries × voxels: 2^18 are 1 MiB in float32 and fit into a CPU cache; a GPU needs fewer, larger
# blocks.
_BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**24}
_KERNEL = 5
_HEADS = 8
_HIDDEN = 64  # hidden width of the class head


class KMaXOutput(NamedTuple):
    """Output of `KMaXDecoder`: two lists with one tensor (B, K, *spatial) per resolution, highest first.

    Attributes:
        logits: the segmentation logits.
        queries: for each voxel the log-probabilities of the K groups of queries, one group per class. A softmax of the
            voxel's similarity to all queries yields the queries' probabilities, which are summed over each group.
    """

    logits: list[torch.Tensor]
    queries: list[torch.Tensor]


def group_sizes(queries: int, groups: int) -> list[int]:
    """Divide the queries among groups as equally as possible, and return the number of queries in each group.

    Raises:
        ValueError: there are fewer queries than groups.

    >>> group_sizes(128, 3)
    [43, 43, 42]
    """
    if queries < groups:
        raise ValueError(
            f"each class needs a query of its own: there are {groups} classes, but only {queries} queries; "
            "increase queries"
        )
    each, more = divmod(queries, groups)
    return [each + (group < more) for group in range(groups)]


def merged(log_responses: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    r"""Return the log-probabilities of groups of queries, computed from those of the individual queries.

    .. math:: \ln q_{gi} = \ln \sum_{n \in g} r_{ni}

    Here n is a query, i a voxel, and g a group of queries.

    Args:
        log_responses: (B, N, V), ln r: for each of V voxels the log-probabilities of the N queries.
        sizes: the number of queries in each of the G groups. A group consists of consecutive queries.

    Returns:
        (B, G, V), ln q: for each voxel the log-probabilities of the groups.
    """
    return torch.stack([group.logsumexp(1) for group in log_responses.split(list(sizes), 1)], 1)


def cluster_means(values: torch.Tensor, assignment: torch.Tensor, clusters: int) -> torch.Tensor:
    """Return the mean feature vector of each cluster of voxels, 0 for an empty cluster.

    Args:
        values: (B, C, V), features of V voxels.
        assignment: (B, V), the cluster of each voxel, integers in [0, N).
        clusters: N, the number of clusters.

    Returns:
        (B, N, C), in float32.
    """
    batch, channels, _ = values.shape
    sums = torch.zeros(batch, clusters, channels, device=values.device)
    sums = sums.scatter_add(1, assignment[:, :, None].expand(-1, -1, channels), values.float().transpose(1, 2))
    counts = sums.new_zeros(batch, clusters).scatter_add(1, assignment, sums.new_ones(assignment.shape))
    return sums / counts.clamp(min=1)[:, :, None]


class CenterUpdate(nn.Module):
    """Update of the queries: one step of k-means, followed by a transformer encoder layer on the queries.

    The step of k-means computes the mean feature vector of the voxels assigned to each query. Layer norm and a linear
    layer project this mean to the width of the queries. The result is added to the query.

    Args:
        width: D, the number of channels of the queries.
        channels: C, the number of channels of the voxel features.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.of_voxels = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.attention = nn.TransformerEncoderLayer(
            width, math.gcd(_HEADS, width), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    @torch.compiler.disable  # it would be recompiled for each width, up to torch's limit
    def forward(self, centers: torch.Tensor, values: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
        """Return the updated queries, (B, N, D).

        Args:
            centers: (B, N, D), the queries.
            values: (B, C, V), the features of V voxels.
            assignment: (B, V), the index of the query to which each voxel is assigned.
        """
        means = cluster_means(values, assignment, centers.shape[1])
        return self.attention(centers + self.of_voxels(means))


class KMaXLevel(nn.Module):
    """Layers of `KMaXDecoder` for one resolution: the embedding of the voxels, and the updates of the queries.

    The similarity between a voxel and a query is the dot product of two vectors of C channels: the embedding of the
    voxel, and the kernel of the query. The kernel is a projection of the query.

    Args:
        architecture: the architecture in the plans.
        stage: the index of the stage in the plans.
        width: D, the number of channels of the queries.
        updates: the number of updates of the queries.
    """

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
        """Return the embeddings of the voxels, and the updated queries with their kernels.

        Args:
            pixels: (B, C, *spatial), features of V voxels.
            centers: (B, N, D), queries.

        Returns:
            The L2-normalised embeddings (B, C, V), the kernels of the updated queries (B, N, C), and the updated
            queries (B, N, D).
        """
        embedded = normalize(self.embedding(pixels), dim=1).flatten(2)
        if self.values is not None:
            values = self.values(pixels).flatten(2)
            for update in self.updates:
                centers = update(centers, values, assign(embedded, self.kernels(centers)))
        return embedded, self.kernels(centers), centers


@torch.no_grad()
@torch.compiler.disable  # the compiler would unroll the loop
def assign(embedded: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Return the index of the most similar query for each voxel, (B, V), without gradient.

    The similarity is the dot product of a voxel's embedding and a query's kernel.

    Args:
        embedded: (B, C, V), the embeddings of the voxels.
        kernels: (B, N, C), the kernels of the queries, see `KMaXLevel`.
    """
    kernels = kernels.float()
    with without_autocast(embedded.device.type):
        return torch.cat([(kernels @ block.float()).argmax(1) for block in _blocks(embedded, kernels)], 1)


@torch.compiler.disable
def respond(
    embedded: torch.Tensor, kernels: torch.Tensor, classes: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the segmentation logits of each voxel, and the log-probabilities of the groups of queries.

    .. math:: r_{ni} = \mathrm{softmax}_n(k_n \cdot z_i), \qquad l_{ji} = \sum_n c_{nj} r_{ni}, \qquad
        \ln q_{gi} = \ln \sum_{n \in g} r_{ni}

    Here n is a query, i a voxel, j a class, and g a group of queries. The probabilities r, (B, N, V), are computed in
    blocks of voxels to save memory. The backward pass computes them again.

    Args:
        embedded: (B, C, V), the embeddings z of the voxels.
        kernels: (B, N, C), the kernels k of the queries, see `KMaXLevel`.
        classes: (B, N, K), the class logits c of the queries.
        sizes: the number of queries in each of the G groups. A group consists of consecutive queries.

    Returns:
        The segmentation logits l, (B, K, V), and the log-probabilities ln q, (B, G, V), both in float32.
    """
    return _Respond.apply(embedded, kernels.float(), classes.float(), sizes)


class _Respond(torch.autograd.Function):
    """Autograd function that computes `respond` and its gradient in blocks of voxels."""

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
        r"""Return the gradients of the loss L with respect to ``embedded``, ``kernels`` and ``classes``.

        The symbols are those of `respond`, without the index i of the voxel. The incoming gradients are
        :math:`u_j = \partial L / \partial l_j` and :math:`w_g = \partial L / \partial \ln q_g`, and g(n) is the group
        that contains query n. The gradient with respect to the similarity :math:`s_n = k_n \cdot z` is

        .. math:: \frac{\partial L}{\partial s_n} = r_n \left(a_n - \sum_m r_m a_m - \sum_g w_g\right)
            + \frac{r_n}{q_{g(n)}} w_{g(n)}, \qquad a_n = \sum_j c_{nj} u_j

        The gradients with respect to k and z follow from it by the chain rule. The gradient with respect to
        :math:`c_{nj}` is the sum of :math:`r_n u_j` over voxels.
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
                within_group = [part.log_softmax(1).exp_() for part in log_responses.split(ctx.sizes, 1)]
                slope += torch.cat([softmax * part for softmax, part in zip(within_group, w.split(1, 1))], 1)
                of_kernels += slope @ voxels.transpose(1, 2)
                of_block.copy_(kernels.transpose(1, 2) @ slope)
        return of_embedded, of_kernels, of_classes, None


def _blocks(volume: torch.Tensor, kernels: torch.Tensor) -> Iterator[torch.Tensor]:
    entries = _BLOCK_ENTRIES.get(volume.device.type, 2**20)
    yield from volume.split(max(1, entries // (kernels.shape[0] * kernels.shape[1])), 2)


class KMaXDecoder(nn.Module):
    """Transformer decoder of kMaX-DeepLab (Yu et al., ECCV 2022, arXiv:2207.04044) on the features of a U-Net decoder.

    N queries, which are learned vectors, are updated from the lowest resolution to the highest. At each resolution
    except the highest there are ``updates`` updates. An update assigns each voxel to the most similar query, as in
    k-means (argmax, without gradient). It then adds the mean of the assigned voxels to each query, and applies
    self-attention among the queries.

    A head predicts logits of the K classes for each query. A softmax of the similarities between a voxel and all
    queries yields one weight for each query. The segmentation logits of the voxel are the weighted mean of the class
    logits of the queries. The queries form K groups, one per class. The query distribution of the voxel is the sum of
    the weights in each group.

    This decoder reproduces that of DK-UXNet. Deviations from its released code (Rows21/DK-UXNet, e268484):

    - the same number of queries (±1) for each class, instead of 16, 4 and 108 of 128 queries for background, organ and
      tumor;
    - segmentation logits and query distribution at every resolution, for deep supervision. The release computes them
      only at the highest resolution. At lower resolutions, the release uses embeddings and kernels (see `KMaXLevel`)
      only to assign voxels to queries. The assignment has no gradient, so the layers for these embeddings and kernels
      are not trained. Without deep supervision, the same applies to this decoder;
    - updates at all resolutions except the highest, as in the variant UXNET of the release. Its variant DKUNET also
      skips the second highest;
    - layer norm for queries and the plans' norm for voxels, instead of batch norm;
    - the mean of the assigned voxels is added to a query, instead of their sum, which would grow with the patch size;
    - numbers of channels from the plans: embeddings have as many channels as the voxel features, and queries as many as
      the deepest stage (256 in the release);
    - a class head (two linear layers, 64 hidden units) applied to each query, instead of one applied to the flattened
      vector of all queries.

    Args:
        architecture: the architecture in the plans, see `Architecture`.
        num_classes: K, the number of output channels: classes including background, or regions.
        queries: N, the number of queries, at least K.
        updates: the number of updates of the queries at each resolution except the highest.

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
        # nnU-Net excludes layers of the name seg_layers from pretrained weights, since their shape depends on the
        # number of classes.
        self.class_embedding = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU())
        self.seg_layers = nn.Linear(_HIDDEN, num_classes)

    def forward(self, pixels: Sequence[torch.Tensor], all_levels: bool = True) -> KMaXOutput:
        """Return the segmentation logits and the query distribution of each voxel.

        Args:
            pixels: features (B, C, *spatial) of each resolution, lowest first. C differs between resolutions.
            all_levels: whether to return the output for all resolutions, or only for the highest one.
        """
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
