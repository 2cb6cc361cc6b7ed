"""Rewrites attention in chosen layers of an ONNX LLM.

`pipeline.py` is the whole export on one screen; its stages are these folders, in order:

    sources/        what the user gave becomes an ONNX file with its companions
    onnx_file/      that file is loaded (and at the end a file like it saved)
    normalize/      many spellings of a graph become fewer
    attention/      attention is found, and what each layer keeps is measured;
    patterns/       one file for each spelling of it
    configuration/  the files beside the model are read, and compared with the graph
    layers/         the layers are chosen
    rewrite/        the operator is put in
    interface/      what the graph takes and gives becomes a table
    targets/        one file or folder for each device: what is done for it, written and checked
    folder/         what else is written: manifest, companions, genai's configuration
    report/         what the user is told
    verify/         the export runs beside its source

`graph/` is what all of them read and build graphs with. A folder imports only folders below it in
the order that `pyproject.toml` gives (import-linter).
"""
