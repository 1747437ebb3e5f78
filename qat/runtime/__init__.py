"""Ground: `packages` judges versions, `device` names accelerators, `memory` of the host."""
