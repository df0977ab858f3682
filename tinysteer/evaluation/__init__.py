"""Did it follow, and is it good: IFEval's checks, quality, the choice of a layer."""
