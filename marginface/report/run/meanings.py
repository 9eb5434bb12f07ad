"""What each figure means: its format and one line."""

# The last part of a figure's name: its format, and what it means in one line.
_PLAIN = "{:.4g}"
_MEANINGS = {
    "accuracy": ("{:.2%}", "pairs decided rightly, threshold of other pairs"),
    "auc": ("{:.4f}", "chance that genuine outscores impostor pair"),
    "eer": ("{:.2%}", "error rate where both errors are equal"),
    "tar@far=1e-1": ("{:.2%}", "genuine accepted if 1 impostor in 10 may be"),
    "tar@far=1e-2": ("{:.2%}", "genuine accepted if 1 impostor in 100 may be"),
    "tar@far=1e-3": ("{:.2%}", "genuine accepted if 1 impostor in 1,000 may"),
    "threshold": ("{:.4f}", "cosine from which a pair is accepted"),
    "sep_mean": ("{:.4f}", "mean cosine to the nearest other class"),
    "sep_var": (_PLAIN, "variance of that cosine over the classes"),
    "top1": ("{:.2%}", "training images nearest to their own class"),
    "target_angle": ("{:.1f}°", "mean angle of images to their own class"),
    "learning_rate": (_PLAIN, "step size at the end"),
    "gradient_norm": (_PLAIN, "length of the last gradient"),
    "total": (_PLAIN, "the sum that is minimised"),
    "grouping": (_PLAIN, "cross-entropy of the latent groups with their own labels"),
    "margin_softmax": (_PLAIN, "mean cross-entropy with the margin"),
    "group_entropy": ("{:.3f}", "evenness of group usage: 1 even, 0 all in one"),
    "group_largest": ("{:.2f}", "largest group's share × number of groups"),
    "collapsed": ("{:.0f}", "1 if the triplet loss has collapsed to one point"),
    "spread": (_PLAIN, "variance of unit embeddings: 0 one point, 1 everywhere"),
    "exclusive": (_PLAIN, "Lr(W), mean cosine to nearest other class"),
    "unreadable": ("{:,.0f}", "training images skipped: they could not be read"),
    "examples_per_s": ("{:,.0f}", "training images per second"),
    "together": ("{:.0f}", "runs that trained in one program and shared its time"),
    "wall_s": ("{:,.0f} s", "from start to end"),
}


def meaning(name: str) -> tuple[str, str]:
    """A figure's format and what it means, by the last part of its name."""
    return _MEANINGS.get(name.rsplit("/", 1)[-1], (_PLAIN, ""))
