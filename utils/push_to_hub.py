"""Upload a model that a run has exported to the Hugging Face hub: python -m utils.push_to_hub FOLDER OWNER/NAME.

The model is private unless --public is given. Local paths in the folder's settings are not uploaded.
"""

from utils.flags.parser import FlagParser, entry_point
from utils.hub import check_target


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Uploads, and prints the address."""
    parser = FlagParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="folder of a model or adapter, as final/ of a run")
    parser.add_argument("target", metavar="OWNER/NAME", help="id on the hub; it is created if it is not there")
    parser.add_argument("--public", action="store_true", help="let everyone see it; default: only its owner")
    parser.add_argument("--base_model", default="", help="id on the hub of the model that an adapter belongs to")
    options = parser.parse_args(argv)
    for target, flag in ((options.target, "OWNER/NAME"), (options.base_model, "--base_model")):
        if target or flag == "OWNER/NAME":
            check_target(target, flag)
    from utils.run.push import left_here, push_folder  # imports torch, which takes seconds

    address = push_folder(options.folder, options.target, not options.public, "OWNER/NAME", options.base_model)
    print(left_here(options.folder) or "all files of the folder are uploaded")
    print(f"uploaded: {address}{'' if options.public else ' (private)'}")


if __name__ == "__main__":
    main()
