"""Sources of photos. A source yields every one of its inputs, one at a time, in a fixed order.

To add a source, write a class with what `content.Source` describes in a file of its own, and let `opening.open_source`
choose it. What cannot be used is yielded too, as an `Input` whose `problem` says why, so that it ends up in the list of
rejects; only a source that is unusable as a whole raises `UserError`. Photos are given as a `Location` where they lie
on the disk, and as bytes where the source streams. The metadata of a row go through `metadata.select_fields`, which
knows the names of columns, and stay the raw values that they are.
"""
