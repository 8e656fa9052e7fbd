"""``python -m forwarder``, and the installed command."""

from forwarder.cli import interrupt

interrupt.be_silent()

from forwarder.cli.main import main  # noqa: E402 - the imports are what is interrupted

if __name__ == "__main__":
    main()
