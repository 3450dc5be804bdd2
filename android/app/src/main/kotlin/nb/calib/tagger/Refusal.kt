package nb.calib.tagger

/** What can be wrong with what the user brings; each has a sentence in res/values/strings.xml. */
enum class Fault {
    NO_PROGRAM, NOT_A_PROGRAM, TRUNCATED, NOT_A_TAGGER, LABELS_DIFFER, NO_BACKEND, NO_PHOTOS, PHOTO_UNREADABLE,
    OUT_OF_MEMORY, NO_LIBRARY, RUN_FAILED, NOT_SAVED;

    /** Name of the sentence's string resource. */
    val key get() = "fault_" + name.lowercase()
}

/** An error that the user can act on: the screen shows the sentence of [fault], filled with [detail]. */
class Refusal(val fault: Fault, val detail: String = "", cause: Throwable? = null) :
    Exception(if (detail.isEmpty()) fault.name else "${fault.name}: $detail", cause)
