"""Megatron-LM's flags that this project does not need: accepted without effect, or refused, each with its reason."""

# Flags that ask for what is always so here: accepted, so that old scripts run, and named in the argument listing.
ALWAYS_SO = {
    "--accumulate-allreduce-grads-in-fp32": "gradients are accumulated and reduced in fp32",
    "--fp32-allreduce": "gradients are accumulated and reduced in fp32",
    "--attention-softmax-in-fp32": "the softmax of attention is computed in fp32",
    "--no-query-key-layer-scaling": "the scaling cancels, and with an fp32 softmax it has nothing to protect",
    "--use-cpu-initialization": "initial weights depend on the seed and the parameter's name alone",
    "--bert-no-binary-head": "there is no next-sentence head",
    "--scaled-masked-softmax-fusion": "how the softmax is fused changes no number",
    "--no-masked-softmax-fusion": "how the softmax is fused changes no number",
    "--no-bias-dropout-fusion": "how dropout is fused changes no number",
    "--exit-signal-handler": "SIGTERM, SIGINT and SIGUSR1 always have a run save and end",
    "--no-save-rng": "randomness derives from the seed and the sample: there is no state to save",
    "--no-load-rng": "randomness derives from the seed and the sample: there is no state to load",
}

_GPT = "it belongs to GPT, and this project pretrains masked protein models"
_RETRIEVAL = "it belongs to ICT and REALM retrieval, which this project does not do"
_AUTORESUME = "autoresume is not part of this project; run the same command again to go on from the last checkpoint"
REFUSED = {
    "--merge-file": _GPT, "--reset-position-ids": _GPT, "--reset-attention-mask": _GPT, "--eod-mask-loss": _GPT,
    "--decoder-seq-length": _GPT, "--scaled-upper-triang-masked-softmax-fusion": _GPT,
    "--ict-head-size": _RETRIEVAL, "--ict-load": _RETRIEVAL, "--bert-load": _RETRIEVAL,
    "--titles-data-path": _RETRIEVAL, "--query-in-block-prob": _RETRIEVAL, "--use-one-sent-docs": _RETRIEVAL,
    "--report-topk-accuracies": _RETRIEVAL,
    "--retriever-score-scaling": _RETRIEVAL, "--block-data-path": _RETRIEVAL, "--embedding-path": _RETRIEVAL,
    "--indexer-batch-size": _RETRIEVAL, "--indexer-log-interval": _RETRIEVAL, "--faiss-use-gpu": _RETRIEVAL,
    "--adlr-autoresume": _AUTORESUME, "--adlr-autoresume-interval": _AUTORESUME,
    "--short-seq-prob": "proteins are packed whole, so there are no shortened sequences",
    "--onnx-safe": "there is no ONNX export",
    "--lazy-mpu-init": "the program joins the process group itself",
    "--warmup": "use --lr-warmup-fraction",
}
