package nb.calib.tagger

/** A loaded network: one float input of batch 1 in, one row of scores out. */
interface Net : AutoCloseable {
    /** Identifiers of the delegates that run it, such as "XnnpackBackend"; none for plain operators. */
    val backends: List<String>

    /** Runs once. Returns as many scores (logits) as the network has outputs. */
    fun run(input: FloatArray): FloatArray
}

/** An upright image as it was decoded: [width] x [height] pixels 0xAARRGGBB, row by row. */
class Pixels(val width: Int, val height: Int, val argb: IntArray) {
    init {
        require(width > 0 && height > 0 && argb.size == width * height) { "$width x $height of ${argb.size} pixels" }
    }
}

/** An image that can be decoded when it is its turn. */
interface Photo {
    val name: String

    /** Decodes and turns upright. Throws [Refusal] when it cannot be read. */
    fun load(): Pixels
}
