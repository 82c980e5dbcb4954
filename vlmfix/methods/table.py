"""The methods of this package, as data: `vlmfix.registry` lists and builds them.

Nothing here imports a method: its module is imported when the method is built. Methods of other
packages have no row here, their entry points name them (docs/add-a-method.md).
"""

from __future__ import annotations

from vlmfix.registry import MethodInfo

__all__ = ["METHODS", "NOT_OFFERED"]

METHODS: tuple[MethodInfo, ...] = (
    MethodInfo(
        name="ad_hh",
        target="vlmfix.methods.ad_hh:AdaptiveHeadDeactivation",
        title="AD-HH, adaptive deactivation of hallucination heads",
        stage="attention",
        summary="Drop too much attention to text in heads known to drive hallucination.",
        paper="Yang et al., ICLR 2025, OpenReview Bjq4W7P2Us",
        needs=("hallucination heads: a preset or `vlmfix attribute`",),
        aliases=("adhh",),
    ),
    MethodInfo(
        name="avc",
        target="vlmfix.methods.avc:AttentionalVisionCalibration",
        title="AVC (AvisC), attentional vision calibration",
        stage="logits",
        summary="Contrast with the few visual tokens that draw attention in every question.",
        paper="Woo et al., arXiv 2405.17820",
        needs=("a branch: twice the prefill, twice the rows of every step",),
        aliases=("avisc",),
    ),
    MethodInfo(
        name="carve",
        target="vlmfix.methods.carve:ContrastiveAttentionRefinement",
        title="CARVE, contrastive attention refinement for visual enhancement",
        stage="pixels",
        summary="Black out, crop and enlarge what the question draws attention to; ask again.",
        paper="Ge et al., ECCV 2026, arXiv 2509.06461",
        needs=(
            "vlmfix.generate, which knows image and question",
            "one more prefill of the image and two short answers",
        ),
    ),
    MethodInfo(
        name="cluster",
        target="vlmfix.methods.cluster:ClusterAggregation",
        title="Cluster and aggregate",
        stage="tokens",
        summary="Group visual tokens by k-means, one mean per group; rebuilt from summaries.",
        paper="Omri, Shroff, Tambe, arXiv 2504.17892",
        aliases=("kmeans",),
    ),
    MethodInfo(
        name="divprune",
        target="vlmfix.methods.divprune:DivPrune",
        title="DivPrune, diversity-based pruning",
        stage="tokens",
        summary="Keep the visual tokens that differ most from each other.",
        paper="Alvar et al., CVPR 2025, arXiv 2503.02175",
    ),
    MethodInfo(
        name="fastv",
        target="vlmfix.methods.fastv:FastV",
        title="FastV",
        stage="tokens",
        summary="Drop, after a few decoder layers, what the last prompt token attends to least.",
        paper="Chen et al., ECCV 2024, arXiv 2403.06764",
        needs=("a dynamic KV cache, and the prompt in one forward",),
    ),
    MethodInfo(
        name="gift",
        target="vlmfix.methods.gift:GazeShiftFusion",
        title="GIFT, gaze shift-guided cross-modal fusion enhancement",
        stage="attention",
        summary="Multiply attention to what the model turned to while it read the question.",
        paper="Qi et al., ICML 2026, arXiv 2510.22067",
        needs=("the prompt in one forward, read before it is edited",),
    ),
    MethodInfo(
        name="head_pursuit",
        target="vlmfix.methods.head_pursuit:HeadPursuit",
        title="Head Pursuit",
        stage="attention",
        summary="Inhibit or enhance the heads that write a concept, found beforehand.",
        paper="NeurIPS 2025, arXiv 2510.21518",
        needs=("a list of heads: vlmfix.analysis.pursuit.rank_heads",),
        aliases=("headpursuit",),
    ),
    MethodInfo(
        name="hiprune",
        target="vlmfix.methods.hiprune:HiPrune",
        title="HiPrune, hierarchical attention of the vision encoder",
        stage="tokens",
        summary=(
            "Keep the visual tokens that the vision encoder attends to in a middle and in its "
            "last layer; HiPrune++ (`text_share`) is experimental, rebuilt from the paper's text."
        ),
        paper="Liu et al., ACL 2026, arXiv 2508.00553",
        needs=("a vision encoder whose patches become visual tokens one to one or in squares",),
    ),
    MethodInfo(
        name="imba",
        target="vlmfix.methods.imba:PayAttentionToInformedTokens",
        title="IMBA (PAINT), paying attention to informed tokens",
        stage="attention",
        summary="Raise the scores of the visual tokens that the vision encoder itself attends to.",
        paper="Arif et al., arXiv 2501.12206",
        needs=("a vision encoder whose patches become visual tokens one to one or in squares",),
        aliases=("paint",),
    ),
    MethodInfo(
        name="m3id",
        target="vlmfix.methods.m3id:MutualInformationDecoding",
        title="M3ID, multi-modal mutual information decoding",
        stage="logits",
        summary="Contrast with no image at all, more strongly the longer the answer gets.",
        paper="Favero et al., CVPR 2024, arXiv 2403.14003",
        needs=("a branch: a text-only prefill, twice the rows of every step",),
    ),
    MethodInfo(
        name="pai",
        target="vlmfix.methods.pai:PayAttentionToImage",
        title="PAI, attention part",
        stage="attention",
        summary="Raise the pre-softmax scores of visual tokens in the row that predicts.",
        paper="Liu et al., ECCV 2024, arXiv 2407.21771",
    ),
    MethodInfo(
        name="pai_guidance",
        target="vlmfix.methods.pai_guidance:ImageGuidance",
        title="PAI, guidance part",
        stage="logits",
        summary="Contrast with no image at all, with one weight; stacks with `pai`.",
        paper="Liu et al., ECCV 2024, arXiv 2407.21771",
        needs=("a branch: a text-only prefill, twice the rows of every step",),
    ),
    MethodInfo(
        name="ptp",
        target="vlmfix.methods.ptp:PyramidTokenPruning",
        title="PTP-style pyramid token pruning (reconstruction)",
        stage="tokens",
        summary=(
            "Reconstruction: keep visual tokens by region, by the vision encoder's attention, and "
            "by the attention of the question."
        ),
        paper="Liang et al., arXiv 2509.15704",
        needs=(
            "a vision encoder whose patches become visual tokens one to one or in squares",
            "a probe pass through the first decoder layers (alpha=0: none)",
        ),
    ),
    MethodInfo(
        name="random",
        target="vlmfix.methods.random_tokens:RandomTokens",
        title="Random visual tokens (baseline)",
        stage="tokens",
        summary="Keep a random sample of the visual tokens: the baseline of every pruning method.",
        paper="Omri, Shroff, Tambe, arXiv 2504.17892",
    ),
    MethodInfo(
        name="rbd",
        target="vlmfix.methods.rbd:ReBalancingContrastiveDecoding",
        title="RBD, re-balancing contrastive decoding (experimental)",
        stage="logits",
        summary=(
            "Experimental, rebuilt from the abstract: away from a noised image, towards the "
            "image's significant tokens."
        ),
        paper="Liang et al., PRCV 2024, arXiv 2409.06485",
        needs=("pixels", "two branches: three times the prefill and the rows of every step"),
    ),
    MethodInfo(
        name="spin",
        target="vlmfix.methods.spin:ImageGuidedHeadSuppression",
        title="SPIN, image-guided head suppression",
        stage="attention",
        summary="Scale down the heads that attend least to the image, chosen at every token.",
        paper="EMNLP 2025, arXiv 2505.16411",
    ),
    MethodInfo(
        name="steer",
        target="vlmfix.methods.steer:Steer",
        title="Steering with given vectors",
        stage="hidden",
        summary="Add a given vector to hidden states, or project a given subspace out of them.",
        paper="the edit of VISTA, arXiv 2502.03628, and Nullu, arXiv 2412.13817",
        needs=("steering vectors: a safetensors file",),
    ),
    MethodInfo(
        name="uniform",
        target="vlmfix.methods.uniform:UniformGrid",
        title="Visual tokens of a regular grid (baseline)",
        stage="tokens",
        summary="Keep the visual tokens of a regular grid: what a lower resolution would do.",
        paper="Omri, Shroff, Tambe, arXiv 2504.17892",
        needs=("a vision encoder whose patches become visual tokens one to one or in squares",),
    ),
    MethodInfo(
        name="vaf",
        target="vlmfix.methods.vaf:VisualAmplificationFusion",
        title="VAF (ClearSight), visual amplification fusion",
        stage="attention",
        summary="Multiply pre-softmax scores: of the image up, of the system prompt down.",
        paper="Yin, Si, Wang, CVPR 2025, arXiv 2503.13107",
        aliases=("clearsight",),
    ),
    MethodInfo(
        name="var",
        target="vlmfix.methods.var:VisualAttentionRedistribution",
        title="VAR, visual attention redistribution",
        stage="attention",
        summary="Move attention from visual sinks to the rest of the image.",
        paper="Kang et al., ICLR 2025, arXiv 2503.03321",
        needs=("sink channels: a preset or `vlmfix calibrate`",),
        aliases=("visattnsink",),
    ),
    MethodInfo(
        name="vcd",
        target="vlmfix.methods.vcd:VisualContrastiveDecoding",
        title="VCD, visual contrastive decoding",
        stage="logits",
        summary="Contrast with the same image under diffusion noise.",
        paper="Leng et al., CVPR 2024, arXiv 2311.16922",
        needs=("pixels", "a branch: twice the prefill, twice the rows of every step"),
    ),
    MethodInfo(
        name="vhr",
        target="vlmfix.methods.vhr:VisionAwareHeadReinforcement",
        title="VHR, vision-aware head reinforcement",
        stage="attention",
        summary="Scale up the heads whose outputs change most without the image.",
        paper="He et al., ACL 2025, arXiv 2412.13949",
        needs=("a probe pass per prompt, without the image",),
    ),
    MethodInfo(
        name="visionzip",
        target="vlmfix.methods.visionzip:VisionZip",
        title="VisionZip, dominant and contextual tokens",
        stage="tokens",
        summary=(
            "Keep the visual tokens that the encoder's class token attends to, and merge the rest "
            "into a few."
        ),
        paper="Yang et al., CVPR 2025, arXiv 2412.04467",
        needs=("a vision encoder whose patches become visual tokens one to one or in squares",),
    ),
)

#: Methods that are asked for by name and are not here, with the reason that `find` gives.
NOT_OFFERED: dict[str, str] = {
    "a_vl": (
        "A-VL (arXiv 2409.14846) makes inference cheaper and does not act on hallucination, its "
        "default settings and the rule by which it drops text are not known here, and its speed "
        "comes from a kernel that gathers keys. For a smaller KV cache use kvpress; "
        "docs/methods/a_vl.md has the details"
    ),
    "icd": (
        "ICD (arXiv 2403.18715) contrasts with a prompt that has one more sentence, and a branch "
        "longer than its prompt has no room in the KV cache that branches share here. 'm3id' and "
        "'vcd' have its formula, with another branch"
    ),
    "visflow": (
        "the formulas of VisFlow (arXiv 2506.12609) are not known here: its code was not found and "
        "its abstract does not give them. 'vaf' raises attention to the image, 'ad_hh' damps heads "
        "that follow the text"
    ),
}
