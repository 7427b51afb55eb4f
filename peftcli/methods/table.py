"""The methods by name: the one place that says what each takes and can do."""

from collections.abc import Mapping

from peftcli.methods.low_rank import LOW_RANK
from peftcli.methods.method import Method
from peftcli.methods.own import OWN
from peftcli.methods.prompts import PROMPTS
from peftcli.methods.rotations import ROTATIONS
from peftcli.methods.sparse import SHARED, SPARSE, SPECTRAL

METHODS: Mapping[str, Method] = {
    method.name: method for method in (*LOW_RANK, *SHARED, *SPECTRAL, *SPARSE, *ROTATIONS, *PROMPTS, *OWN)
}
