"""What becomes of checkpoints: arithmetic on their weights, streamed, into a new checkpoint.

    BASE + 0.4 FT1 --> expression --> Combination of Checkpoints --> boxes --> files, .metadata, edit.json
                                      pieces of files, fp32 sum      verified, renamed to --output

    __main__.py       python -m titan_attent.edit
    command.py        its command line
    options.py        options that it shares with the search
    expression.py     a base and task vectors, from the words of the command line
    averages.py       weights of means, and the decay that a mean replaces
    layers.py         factors by layer
    storage.py        files of a checkpoint, local or remote
    uncached.py       local files that leave nothing in the system's cache
    boxes.py          the parts in which tensors are read and written
    memory.py         memory that tensors use one after the other
    stored_tensor.py  where the bytes of a tensor are in a torch.save archive
    pieces.py         a box of a tensor from the shards of several ranks
    checkpoint.py     the weights of a checkpoint
    hugging_face.py   the weights of a folder of *.safetensors
    read_ahead.py     a checkpoint whose boxes are read before they are asked for
    compare.py        refuses checkpoints that do not fit together
    transforms.py     pruning, low rank, and the random control
    combine.py        one box of the result
    writer.py         the files of the result, on several processes
    output.py         a folder that appears when it is complete
    provenance.py     what a result was made of
    run.py            one edit from its operands to its checkpoint
    search.py         coefficients tried on a target and a control data set
    search_result.py  the points that it tried
    search_report.py  their table and heat maps

torchtitan's adapters are in titan/hugging_face.py, its forward pass is in titan/scoring.
"""
