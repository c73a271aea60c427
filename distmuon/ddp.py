"""DDP without all-reduced matrices: gradients go to the rank that orthogonalizes them."""

# annotations are not postponed here: DDP looks at them
import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.owner_reduce import reduce_to_owners
from distmuon.muon import Muon
from distmuon.wrapped import WrappedMuon


def ddp_hook(
    optimizer: Muon | WrappedMuon,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch's stubs leave it out
) -> torch.futures.Future[Tensor]:
    """Communication hook of DistributedDataParallel that reduces a matrix's gradient to its owner only.

    Plain DDP all-reduces every gradient, though only its owner orthogonalizes a matrix. With this hook,
    gradients and updates of the matrices together move fewer bytes than plain DDP moves for gradients
    alone. Embeddings, norms and biases are all-reduced as ever::

        model = DistributedDataParallel(model)
        optimizer = distmuon.Muon(model, ...)
        model.register_comm_hook(optimizer, distmuon.ddp_hook)

    From then on, on ranks that do not own it, the gradient of a matrix is NaN after the backward pass and
    its momentum is not kept. So

    - clip by ``distmuon.clip_grad_norm_(model, max_norm, owners=optimizer.owners())``;
    - call ``optimizer.consolidate_state_dict()`` on all ranks before ``optimizer.state_dict()``;
    - call ``zero_grad()`` before each backward pass that synchronizes (``no_sync`` accumulates as ever);
    - train in bfloat16 or float32: a ``GradScaler`` looks at gradients of each rank on its own.

    Args:
        optimizer: Over the parameters of the DDP module, wrapped or not; the hook's state.
        bucket: What DDP hands to a hook.

    Returns:
        The filled buffer of the bucket, later.

    Raises:
        ValueError: if the optimizer does not share its work over the ranks of DDP.
    """
    owners, group = optimizer.start_owner_gradients()
    return reduce_to_owners(bucket, owners, group)
